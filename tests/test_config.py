"""Configuration: defaults < preset < overrides, and errors that help."""

from dataclasses import dataclass, field

import pytest

from raylarge.config import build, parse, plain
from raylarge.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Outer:
    steps: int = 10
    slides: str = ""
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


PRESETS = {"tiny": {"steps": 2, "inner": {"rate": 0.1}}}


def test_later_layers_win():
    config = parse(Outer, ["inner.rate=0.3", "preset=tiny", "limit=4"], PRESETS)
    assert (config.steps, config.inner.rate, config.limit) == (2, 0.3, 4)
    assert isinstance(config.inner, Inner)


def test_what_is_plain_can_be_built_again():
    config = parse(Outer, ["inner.names=[b,c]"], {})
    assert build(Outer, plain(config)) == config


@pytest.mark.parametrize("value", ["*.svs", "{a}.svs", "s3://b/*.svs", "a.svs,b b.svs", "&x", ""])
def test_a_value_may_look_like_anything(value):
    assert parse(Outer, [f"slides={value}"], {}).slides == value


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stepps=3"], r"unknown key 'stepps'; did you mean 'steps'\?"),
        (["inner.rat=3"], r"unknown key 'inner.rat'; did you mean 'inner.rate'\?"),
        (["steps=many"], r"'steps': .*'many'"),
        (["steps"], "'steps' is not of the form key=value; keys: steps, slides"),
        (["preset=huge"], "no preset 'huge'; choose one of: tiny"),
    ],
)
def test_an_error_names_the_key_and_the_cure(words, says):
    with pytest.raises(UserError, match=says):
        parse(Outer, words, PRESETS)
