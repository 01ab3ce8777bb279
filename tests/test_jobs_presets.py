"""Presets: they fit the jobs, the papers' figures are in them, and they say what they cost."""

import re

import pytest
import torch

from jobs import prepare, presets, train
from jobs.presets import PREPARE, PRESETS, TRAIN, overrides
from raylarge.config import build
from raylarge.data.prepare import Prepare
from raylarge.errors import UserError
from raylarge.models import ssl
from raylarge.models.cdm import CDM
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.models.unet import UNetConfig
from raylarge.train.config import Train, checked
from raylarge.train.task import DataFacts
from raylarge.train.tasks.ldm import LdmTask

TRAININGS = [(model, name) for model in TRAIN for name in TRAIN[model]]
ZOOM = ("brca", "brca_released", "naip")
GRAIKOS = ("graikos_brca", "graikos_crc", "graikos_naip")


def trained(model, name):
    return checked(build(Train, {"model": model, "data": "-", "out": "-"}, overrides(model, name)))


def prepared(name):
    return build(Prepare, {"out": "-"}, PREPARE[name])


def parameters(network):
    return sum(one.numel() for one in network.parameters())


@pytest.mark.parametrize(("model", "name"), TRAININGS, ids=[" ".join(one) for one in TRAININGS])
def test_a_preset_is_a_training_that_can_be(model, name):
    config = trained(model, name)
    assert config.batch % max(1, config.workers) == 0  # equal shares
    assert config.warmup < config.steps / 5


@pytest.mark.parametrize("name", PREPARE)
def test_a_preset_prepares_what_it_trains_on(name):
    config = prepared(name)
    config.tile.check()
    config.shard.check()
    card = ssl.card(config.embed.encoder)
    width = {"brca": 1024, "naip": 1024, "graikos_brca": 384, "tiny": 1280, "small": 1280}
    assert card.width == width.get(name.removesuffix("_released"), 768)
    assert name in TRAIN["ldm"]


def test_the_demo_s_figures_stay():
    recipe = ("steps", "batch", "lr", "warmup", "schedule")
    kept = {model: [TRAIN[model]["tiny"][key] for key in recipe] for model in TRAIN}
    assert kept == {
        "vae": [4000, 16, 2e-3, 50, "cosine"],
        "ldm": [20000, 32, 1e-3, 100, "cosine"],
        "cdm": [20000, 32, 5e-4, 100, "cosine"],
    }
    assert PREPARE["tiny"]["tile"]["scales"] == [0, 1, 2, 3]


def test_zoomldm_as_published():
    """Section 4.1, S3.1; reference configuration of the released code."""
    config = trained("ldm", "brca")
    assert (config.batch, config.workers, config.lr, config.warmup) == (600, 3, 1e-4, 10_000)
    assert (config.ldm.prediction, config.ldm.drop) == ("epsilon", 0.1)
    assert config.ldm.unet == UNetConfig()
    assert vars(config.ldm.summarizer) == {"kind": "vit", "width": 512, "layers": 12, "heads": 8}
    cdm = trained("cdm", "brca")
    assert (cdm.lr, cdm.batch, cdm.schedule, cdm.weight_decay) == (1e-4, 256, "constant", 0.0)
    size = {"width": 768, "depth": 12, "heads": 12}
    assert vars(cdm.cdm) == {**size, "learn_sigma": True, "standardised": False}
    released = trained("ldm", "brca_released")
    assert (released.lr, released.warmup, released.batch / 3) == (2e-5, 1000, 420)
    assert [len(prepared(name).tile.scales) for name in ZOOM] == [8, 8, 4]
    assert prepared("naip").tile.base_mpp == 1e6


def test_graikos_as_published():
    """Section 4 and supplement 12, 14; their released configurations."""
    for name in GRAIKOS:
        config = trained("ldm", name)
        assert (config.lr, config.optimizer) == (1e-4, "adamw8bit")
        assert (config.ldm.summarizer.kind, config.ldm.summarizer.width) == ("vector", 512)
        assert config.batch / config.workers == (256 if name == "graikos_naip" else 100)
        assert prepared(name).encode.flips
        assert prepared(name).tile.scales == [0]


def test_small_is_as_large_as_it_says():
    facts = DataFacts(1280, dict.fromkeys(range(6), 1), (3, 64, 64), (3, 16, 16), 0.7, {})
    config = trained("ldm", "small")
    cdm, vae = trained("cdm", "small").cdm, trained("vae", "small").vae
    with torch.device("meta"):
        network = LdmTask(config.ldm, facts, 0).network
        sizes = [parameters(one) for one in (network, network.unet, network.summarizer)]
        sizes.append(parameters(CDM(config.ldm.summarizer.width, 65, scales=6, **vars(cdm))))
        sizes.append(parameters(LightAutoencoder(width=vae.width, blocks=vae.blocks)))
    said = [float(one) for one in re.findall(r"(\d+\.\d) (?:million|M)\b", presets.small.__doc__)]
    assert [round(size / 1e6, 1) for size in sizes] == said
    assert config.ldm.prediction == "v_prediction"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_costs_and_brings(name):
    said = PRESETS[name].__doc__
    assert re.search(r"hours of an H100|an hour\b.*\bH100|Measured: benchmarks/", said, re.DOTALL)
    assert re.search(r"Expect|FID", said)


@pytest.mark.parametrize("name", [*ZOOM, *GRAIKOS])
def test_the_cost_is_that_of_the_plan(name):
    """FLOPs of a sample as planned: 3.02 and, with checkpointing, 3.68 forward passes."""
    config = trained("ldm", name)
    flops = 776.8e9 if config.checkpointing else 652.0e9
    hours = config.steps * config.batch * flops / (0.35 * 989.4e12) / 3600
    found = re.search(r"(\d+) hours of an H100(?: \(.*?\))?, (\d+) dollars", presets_doc(name))
    assert float(found[1]) == pytest.approx(hours, abs=0.6)
    assert float(found[2]) == pytest.approx(2.5 * hours, abs=0.6)


def presets_doc(name):
    return " ".join(PRESETS[name].__doc__.split())


def test_an_unknown_preset_is_told_those_there_are():
    with pytest.raises(UserError, match="no preset 'brcaa'; did you mean 'brca'") as error:
        overrides("ldm", "brcaa")
    assert all(name in str(error.value) for name in PRESETS)
    with pytest.raises(UserError, match="no preset 'x'; choose one of: tiny, small, brca"):
        overrides("vae", "x")


def test_a_published_autoencoder_is_imported_not_trained():
    for name in (*ZOOM, *GRAIKOS):
        with pytest.raises(UserError, match=r"python jobs/import_weights\.py checkpoint="):
            overrides("vae", name)
    with pytest.raises(UserError, match="published VQ-f4"):
        train.main(["model=vae", "preset=brca", "data=-", "out=-"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model=ldmm"], "no model 'ldmm'; did you mean model=ldm"),
        (["model=what"], "no model 'what'; choose one of: vae, ldm, cdm"),
        (["preset=tiny"], "model= is not given; choose one of: vae, ldm, cdm"),
        (["model=ldm", "preset="], "no preset ''; choose one of: tiny, small, brca"),
        (["model=ldm", "learning_rate=1"], r"unknown key 'learning_rate'; the keys there are:"),
        (["model=ldm", "seeed=1"], r"unknown key 'seeed'; did you mean 'seed'\?"),
        (["model=ldm"], "^data, out must be given"),
        (["model=ldm", "data=x", "out="], "out= is empty"),
        (["model=cdm", "data=x", "plan=true"], "out= is empty"),
        (["model=cdm", "plan=true"], "planned on data alone"),
    ],
)
def test_a_training_that_cannot_be_is_a_sentence(words, says):
    with pytest.raises(UserError, match=says):
        train.main(words)


@pytest.mark.parametrize("out", ["", "s3://"])
def test_a_preparation_into_nothing_is_refused(out):
    with pytest.raises(UserError, match=f"^out={out} (is empty|names no bucket)"):
        prepare.main([f"out={out}", "slides=none.svs"])


def test_of_two_presets_the_last_counts(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train", seen.append)
    train.main(["model=ldm", "preset=tiny", "preset=small", "data=a", "out=b"])
    assert seen == [build(Train, {"model": "ldm", "data": "a", "out": "b"}, TRAIN["ldm"]["small"])]


def test_a_model_without_a_preset_is_told_which_have_one():
    with pytest.raises(UserError, match="nothing of model=cdm; those that do: tiny, small, brca"):
        overrides("cdm", "graikos_brca")
    with pytest.raises(UserError, match="nothing of model=mil; leave preset= out, as none does"):
        overrides("mil", "brca")
