"""A bundle's files: found anywhere, named by what is in them, of old formats too, or refused."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from bundles import WEIGHTS, networks, other, written
from hub import Hub, redirect
from safetensors.torch import load_file, save_file

from raylarge import storage
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models import bundle, bundle_parts
from raylarge.models.prior import GridPrior

pytestmark = pytest.mark.usefixtures("one_thread")
FORMAT_1 = Path(__file__).parent / "data" / "bundle_v1"
FORMAT_2 = Path(__file__).parent / "data" / "bundle_v2"


def serve(server, folder):
    server.files["owner/bundle"] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_a_download_that_was_broken_off_is_completed(tmp_path, monkeypatch):
    folder, _ = written(tmp_path / "b")
    server = Hub()
    serve(server, folder)
    redirect(monkeypatch, server.url, tmp_path / "cache")
    try:
        for come in (["model_index.json"], ["model_index.json", "*/*.json", "vae/*"]):
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            huggingface_hub.snapshot_download("owner/bundle", allow_patterns=come)
            assert bundle.load("owner/bundle").digest == bundle.digest(folder)
        shutil.rmtree(tmp_path / "cache")
        huggingface_hub.snapshot_download("owner/bundle", allow_patterns=come)
    finally:
        server.close()
    redirect(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(UserError, match="owner/bundle could not be loaded from"):
        bundle.load("owner/bundle")


@pytest.mark.parametrize("path", ["./nowhere", "../nowhere", "out/b..x", "out/", "a--b/c", "~/b"])
def test_a_path_is_no_name_of_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no bundle at "):
        bundle.load(path)


def test_a_folder_that_is_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out/begun").mkdir(parents=True)
    with pytest.raises(UserError, match="there is no bundle at out/begun"):
        bundle.load("out/begun")


def test_a_bundle_comes_from_the_hub(tmp_path, monkeypatch):
    folder, _ = written(tmp_path / "b")
    server = Hub()
    try:
        serve(server, folder)
        redirect(monkeypatch, server.url, tmp_path / "cache")
        loaded = bundle.load("owner/bundle")
        assert loaded.digest == bundle.digest(folder)
        with pytest.raises(UserError, match=r"owner/other .*no such folder either: copy"):
            bundle.load("owner/other")
    finally:
        server.close()
    assert bundle.load("owner/bundle").digest == loaded.digest  # from the cache, hub gone


def test_no_hub_and_no_folder_is_told_at_once(tmp_path, monkeypatch):
    redirect(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(UserError, match=r"could not be loaded.*no such folder either: copy"):
        bundle.load("owner/bundle")


@pytest.mark.s3
def test_a_digest_names_the_weights_under_any_name_of_the_folder(tmp_path, s3_bucket):
    folders = [tmp_path / "b", tmp_path / "b [1]", tmp_path / "st*r", f"{tmp_path}/trail/"]
    folders += [f"{s3_bucket}/digests/one/", f"{s3_bucket}/digests/b [1]"]
    same = {bundle.digest(written(folder)[0], ("vae",)) for folder in folders}
    assert len(same) == 1
    for folder in map(str, folders):
        noted = bundle.facts(folder)["digests"]
        assert noted["unet"] == bundle_parts.computed_digest(storage.join(folder, "unet"))
        before = bundle.digest(folder)
        bundle.save(folder, {"vae": other(networks()["light"])}, {})
        assert bundle.digest(folder, ("vae",)) not in same
        assert bundle.digest(folder) != before


def changed(folder, part, change):
    path = Path(folder, part, "diffusion_pytorch_model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("conv_in.bias"), r"1 missing \(conv_in\.bias\)"),
        (lambda tensors: tensors.update(odd=torch.ones(2)), r"1 unexpected \(odd\)"),
        (
            lambda tensors: tensors.update({"conv_in.bias": torch.ones(5)}),
            r"1 misshaped \(conv_in\.bias \[5\] instead of \[8\]\)",
        ),
    ],
)
def test_loading_names_what_is_missing_or_extra(tmp_path, change, told):
    folder, _ = written(tmp_path / "b")
    changed(folder, "unet", change)
    with pytest.raises(UserError, match=rf"not the weights of .*unet: {told}"):
        bundle.load(folder)


def test_an_incomplete_or_foreign_bundle_is_refused(tmp_path):
    folder, _ = written(tmp_path / "b")
    Path(folder, "unet", "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"unet/.* does not exist: the bundle is incomplete"):
        bundle.load(folder)
    index = Path(folder, "model_index.json")
    values = json.loads(index.read_text())
    for wrong, told in [
        ({"unet": ["diffusers", "FluxTransformer"]}, "unet is a FluxTransformer; expected"),
        ({"raylarge": {"patch_px": 32, "format": 99}}, "has format 99, this raylarge reads 1 to"),
        ({"raylarge": {}}, "has format 0"),
    ]:
        index.write_text(json.dumps(values | wrong))
        with pytest.raises(UserError, match=told):
            bundle.load(folder)


def rewritten(folder, file, **values):
    path = Path(folder, file)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGED = {
    f"unet/{WEIGHTS}": r"unet/diffusion.*\.safetensors is not readable as safetensors",
    "unet/config.json": r"unet/config\.json is not readable as JSON",
    "model_index.json": r"model_index\.json is not readable as JSON",
    "scheduler/scheduler_config.json": r"scheduler_config\.json is not readable as JSON",
}


@pytest.mark.parametrize("file", DAMAGED)
@pytest.mark.parametrize("size", [0, 1, 40])
def test_a_file_that_was_cut_short_is_named(tmp_path, file, size):
    folder, _ = written(tmp_path / "b")
    path = Path(folder, file)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=DAMAGED[file]):
        bundle.load(folder)


def test_facts_that_cannot_be_are_told(tmp_path):
    folder, _ = written(tmp_path / "b")
    whole, walk = Path(folder, "model_index.json").read_text(), "scheduler/scheduler_config.json"
    for file, values, told in [
        ("model_index.json", {"raylarge": {"format": "x"}}, r"model_index\.json: .* has format x,"),
        ("model_index.json", {"raylarge": 3}, "has format 3"),
        ("model_index.json", {"raylarge": {"format": 2}}, r"model_index\.json gives None as patch"),
        ("model_index.json", {"unet": "UNet"}, "unet is a UNet; expected UNet2DConditionModel"),
        (walk, {"prediction_type": "flow"}, r"scheduler_config\.json describes no .*'flow'"),
        (walk, {"beta_schedule": "odd", "prediction_type": "sample"}, r"no schedule .*'odd'"),
        (walk, {"beta_schedule": "linear", "num_train_timesteps": -1}, "describes no schedule"),
    ]:
        Path(folder, "model_index.json").write_text(whole)
        rewritten(folder, file, **values)
        with pytest.raises(UserError, match=told):
            bundle.load(folder)
    Path(folder, "model_index.json").write_text("[]")
    with pytest.raises(UserError, match=r"model_index\.json is no JSON object"):
        bundle.load(folder)


def test_a_part_without_files_has_no_digest(tmp_path):
    folder, _ = written(tmp_path / "b")
    index = json.loads(Path(folder, "model_index.json").read_text())
    bundle_parts.write_index(folder, index, {"patch_px": 32, "format": 2})
    shutil.rmtree(Path(folder, "unet"))
    with pytest.raises(UserError, match="unet contains no files: the bundle is incomplete"):
        bundle.digest(folder)
    with pytest.raises(UserError, match="lacks cdm"):
        bundle.digest(folder, ("vae", "cdm"))


def test_a_digest_covers_the_schedule_and_the_patch(tmp_path):
    folder, given = written(tmp_path / "b")
    whole, vae = bundle.digest(folder), bundle.digest(folder, ("vae",))
    assert vae == storage.digest(bundle.facts(folder)["digests"]["vae"].encode())  # of LATENTS
    bundle.save(folder, {"unet": given["unet"]}, {}, Schedule(prediction="v_prediction"))
    other_schedule = bundle.digest(folder)
    bundle.save(folder, {}, {"patch_px": 64})
    assert len({whole, other_schedule, bundle.digest(folder)}) == 3
    assert bundle.digest(folder, ("vae",)) == vae
    bundle.save(folder, {"unet": given["unet"]}, {"patch_px": 32})
    assert bundle.digest(folder) == whole


def test_sharded_weights_are_read(tmp_path):
    folder, parts = written(tmp_path / "b")
    shutil.rmtree(Path(folder, "unet"))
    parts["unet"].save_pretrained(Path(folder, "unet"), max_shard_size="100KB")
    assert len(list(Path(folder, "unet").glob("*.safetensors"))) > 1
    found = bundle.load(folder).unet.state_dict()
    assert all(torch.equal(found[k], v) for k, v in parts["unet"].state_dict().items())


def test_a_bundle_of_format_1_computes_what_it_did(tmp_path):
    """Written by the code of that format, which also noted the mean squares."""
    wanted = json.loads((FORMAT_1 / "expected.json").read_text())
    loaded = bundle.load(str(FORMAT_1))
    found = figures_of(loaded)
    assert found == pytest.approx(wanted, rel=1e-5)
    # A part added to it makes it a bundle of today's format, and still a whole one.
    again = str(tmp_path / "again")
    latents = bundle.digest(str(FORMAT_1), ("vae",))
    for added in (
        {"cdm": loaded.cdm},
        {"prior": GridPrior(8, 3, width=16, blocks=1)},
        {"unet": loaded.unet, "summarizer": loaded.summarizer},
    ):
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(FORMAT_1, again)
        bundle.save(again, added, {})
        assert bundle.facts(again)["format"] == 2
        assert figures_of(bundle.load(again)) == found
        assert json.loads(Path(again, "cdm/config.json").read_text())["learn_sigma"] is False
        noted = bundle.facts(again)["digests"]
        assert noted["cdm"] == bundle_parts.computed_digest(f"{again}/cdm")
        assert bundle.digest(again, ("vae",)) == latents


def test_a_bundle_of_format_2_computes_what_it_did():
    """Written with all parts but a ControlNet, by the first code of that format."""
    expected = json.loads((FORMAT_2 / "expected.json").read_text())
    loaded = bundle.load(str(FORMAT_2))
    assert loaded.digest == expected.pop("digest")
    assert loaded.schedule == Schedule(prediction="v_prediction")
    assert (loaded.patch.side_px, loaded.patch.scales, loaded.base_mpp) == (32, 2, 0.5)

    def noise(*shape):
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(*shape, generator=generator)

    tokens, x_t = loaded.summarizer(noise(1, 8, 2, 2), torch.tensor([1])), noise(1, 3, 8, 8)
    figures = {
        "tokens": tokens,
        "x_0": loaded.denoiser()(x_t, 500, tokens),
        "drawn": loaded.cdm.draw(1, 0, [(0,)]),
        "grid": loaded.prior.draw(noise(1, 4), 0, [(0,)], 5, 2.0),
        "image": loaded.vae.decode(x_t),
        "small": loaded.vae_small.decode(x_t),
    }
    sums = {name: float(value.abs().sum()) for name, value in figures.items()}
    assert sums == pytest.approx(expected, rel=1e-5)
    assert bundle.mismatched_parts(str(FORMAT_2)) == {}
    for name, digest in bundle.facts(str(FORMAT_2))["digests"].items():
        assert bundle_parts.computed_digest(str(FORMAT_2 / name)) == digest


def test_a_killed_migration_changes_nothing_and_goes_on(tmp_path, monkeypatch):
    folder = str(tmp_path / "b")
    shutil.copytree(FORMAT_1, folder)
    found = figures_of(bundle.load(folder))
    prior = {"prior": GridPrior(8, 3, width=16, blocks=1)}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bundle_parts, "write_index", killed)
    with pytest.raises(KeyboardInterrupt):
        bundle.save(folder, prior, {})
    monkeypatch.undo()
    assert bundle.facts(folder)["format"] == 1
    assert figures_of(bundle.load(folder)) == found
    bundle.save(folder, prior, {})
    assert figures_of(bundle.load(folder)) == found


def figures_of(loaded):
    """The mean squares that the code of format 1 noted."""
    x = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    grid = torch.linspace(-1, 1, 32).reshape(1, 8, 2, 2)
    with torch.no_grad():
        tokens = loaded.summarizer(grid, torch.tensor([1]))
        found = {
            "tokens": tokens,
            "x_0": loaded.denoiser()(x, 501, tokens),
            "drawn": loaded.cdm.draw(1, 7, [(1, 0, 0)]),
            "image": loaded.vae.decode(x),
        }
    return {name: float(value.double().square().mean()) for name, value in found.items()}
