"""NaN and infinity never become pixels: weights, overflows on the way, decoded images."""

import pytest
import torch
from bundles import WEIGHTS, conditioners, networks, small_unet, written
from safetensors.torch import load_file, save_file

from jobs import sample as job
from raylarge import order as orders
from raylarge.errors import UserError
from raylarge.models import bundle
from raylarge.models.cdm import CDM
from raylarge.sampling import joint
from raylarge.sampling.plan import run
from raylarge.sampling.tasks import DecodeBand, DecodePatches, DenoiseWindows, Parts
from raylarge.workers.finite import check_reply, described
from raylarge.workers.worker import Worker


@pytest.fixture
def folder(tmp_path):
    """A bundle with every part that this file breaks."""
    cdm = CDM(16, width=16, depth=1, heads=2, scales=3, learn_sigma=False, standardised=True)
    return written(tmp_path / "bundle", cdm=cdm)[0]


def broken(folder, part, value, name=None):
    """Put a value into a weight file, the digest in the index as before; the tensor's name."""
    path = f"{folder}/{part}/{WEIGHTS}"
    state = load_file(path)
    name = name or next(name for name, one in state.items() if one.is_floating_point())
    state[name].view(-1)[-1] = value
    save_file(state, path, {"format": "pt"})
    return name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["vae", "unet", "summarizer", "cdm"])
def test_weights_that_are_not_finite_make_no_image(folder, tmp_path, part, value):
    name = broken(folder, part, value)
    words = [f"bundle={folder}", "order.size=32", f"out={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=rf"{part}: 1 of \d+ tensors hold NaN or infinite") as said:
        job.main([*words, "order.sampler.steps=1"])
    assert name in str(said.value)
    assert not list(tmp_path.glob("out/image.*"))


def test_weights_beyond_float16_name_the_precisions_that_hold_them(folder):
    name = broken(folder, "unet", 1e6)
    with pytest.raises(UserError, match=rf"{name} are too large for float16; choose dtype=bfloat"):
        bundle.load(folder, dtype=torch.float16)
    bundle.load(folder, dtype=torch.bfloat16)


def test_an_autoencoder_that_is_not_finite_encodes_nothing(folder):
    broken(folder, "vae", float("nan"))
    with pytest.raises(UserError, match="vae: 1 of"):
        bundle.load_autoencoder(folder)


def test_a_bundle_takes_no_part_that_is_not_finite(folder):
    before = bundle.digest(folder)
    unet = small_unet()
    with torch.no_grad():
        unet.conv_in.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"unet is not written: 1 of \d+ tensors .*conv_in\.bias"):
        bundle.save(folder, {"vae": networks()["light"], "unet": unet}, {})
    assert bundle.digest(folder) == before


def exploding(folder):
    """The bundle with finite weights whose U-Net's output is beyond float32."""
    loaded = bundle.load(folder)
    with torch.no_grad():
        loaded.unet.conv_out.weight.fill_(3e38)
    return loaded


SETTINGS = [{"corrections": 0}, {"corrections": 1}, {"corrections": 1, "constraint": "mosaic"}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_overflow_is_an_error_with_the_place(folder, settings):
    loaded = exploding(folder)
    sampler = {"steps": 2, **settings}
    values = {"size": 64, "sampler": sampler, "condition": {"kind": "cdm"}, "batch": 4}
    with pytest.raises(UserError, match=r"at scale|row \d of windows") as said:
        run(joint.large(orders.parse(values), loaded.patch), Worker(loaded).answer)
    assert "hold NaN or infinite values, so no image is written" in str(said.value)


def test_strided_sampling_that_overflows_names_its_band(folder):
    loaded = exploding(folder)
    grid = torch.randn(2, 2, 8).numpy()
    order = orders.parse({"size": 64, "algorithm": "strided", "sampler": {"steps": 2}})
    order = order.replace(condition=orders.Condition.of(grid))
    with pytest.raises(UserError, match="the latents of band 0 at step 0 hold NaN"):
        run(joint.overlapping(order, loaded.patch), Worker(loaded).answer)


def test_a_decoder_that_overflows_is_an_error(folder):
    """Finite latents, images beyond half precision."""
    loaded = bundle.load(folder, dtype=torch.float16)
    with torch.no_grad():
        for weight in loaded.vae.network.decoder.parameters():
            weight.mul_(2e4).clamp_(-6e4, 6e4)
    order = orders.parse({"count": 1, "sampler": {"steps": 1}, "batch": 1})
    with pytest.raises(UserError, match="the decoded patches hold NaN or infinite"):
        run(joint.patches(order, loaded.patch), Worker(loaded).answer)


def test_replies_are_checked_in_all_their_parts():
    order = orders.parse({"size": 64})
    task = DenoiseWindows(order, 0, tuple((0, i) for i in range(6)), 10, 20, 1)
    fine, bad = torch.zeros(2, 3), torch.tensor([1.0, float("inf")])
    for reply in (fine, Parts(fine, (fine, fine)), torch.zeros(0), torch.ones(2).bfloat16()):
        check_reply(task, reply)
    for reply in (bad, bad.half(), Parts(bad, ()), Parts(fine, (fine, bad))):
        with pytest.raises(UserError, match=r"\(0, 3\), … at scale 0 after steps 11 to 20"):
            check_reply(task, reply)
    assert described(DecodeBand(order, (), 64, 128)) == "the decoded pixel rows 64 to 127"
    assert described(DecodePatches(order)) == "the decoded patches"


def test_conditioners_of_every_kind_are_checked(tmp_path):
    for kind in conditioners():
        folder = written(tmp_path / kind, conditioner=kind)[0]
        broken(folder, "summarizer", float("nan"))
        with pytest.raises(UserError, match="summarizer: 1 of"):
            bundle.load(folder)
