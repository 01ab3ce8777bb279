"""`--help` of every job: plain text, status 0, every key with a meaning."""

import importlib

import pytest

from raylarge.config import fields

JOBS = ("prepare", "train", "sample", "exchange", "import_weights", "demo")


def printed(job, words, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"jobs.{job}").main(words)
    assert end.value.code == 0
    return capsys.readouterr().out


def undescribed(schema):
    """The keys of a dataclass that its source does not describe."""
    for key in fields.keys(schema):
        if key.section:
            yield from undescribed(key.section)
        elif not key.description:
            yield f"{schema.__name__}.{key.name}"


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("job", JOBS)
def test_every_job_describes_its_keys(job, flag, capsys):
    text = printed(job, [flag], capsys)
    assert text.startswith(importlib.import_module(f"jobs.{job}").__doc__.strip()[:40])
    assert "\nout=" in text
    assert "example: " in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("job", "words", "inside", "outside"),
    [
        (
            "sample",
            [],
            ["\norder.size=", "\norder.sampler.steps=50", "\norder.condition.kind="],
            [],
        ),
        ("train", [], ["\nlr=", "model=cdm --help", "preset=NAME"], ["\nldm.", "\nvae."]),
        ("train", ["model=ldm"], ["\nlr=", "\nldm.unet.channels="], ["\nvae.", "\ncdm."]),
        ("prepare", [], ["preset=NAME", "brca", "\ntile.mask="], []),
        ("exchange", [], ["export=features", "import=tissue", "\ntable="], []),
    ],
)
def test_help_holds_the_keys_of_what_is_named(job, words, inside, outside, capsys):
    text = printed(job, [*words, "--help"], capsys)
    assert [part for part in inside if part not in text] == []
    assert [part for part in outside if part in text] == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("raylarge.data.prepare", "Prepare"),
        ("raylarge.train.config", "Train"),
        ("raylarge.execution.config", "SampleConfig"),
        ("raylarge.data.exchange.h5", "Export"),
        ("raylarge.data.exchange.h5", "Outlines"),
        ("raylarge.data.exchange.h5_embed", "Import"),
        ("raylarge.data.exchange.h5_features", "Features"),
        ("raylarge.data.exchange.published", "Published"),
        ("raylarge.models.bundle_import", "ImportConfig"),
        ("jobs.demo", "Demo"),
    ],
)
def test_no_key_lacks_a_description(module, name):
    assert list(undescribed(getattr(importlib.import_module(module), name))) == []
