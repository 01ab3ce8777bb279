"""Configuration: defaults < preset < overrides, and errors that help."""

import re
from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING

from raylarge.config import build, parse, plain, require_place
from raylarge.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)
    ends: tuple[float, float] = (0.0, 1.0)
    flags: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Outer:
    steps: int = 10
    slides: str = ""
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Placed(Outer):
    data: str = MISSING
    out: str = MISSING


PRESETS = {"tiny": {"steps": 2, "inner": {"rate": 0.1}}, "small": {"steps": 3}}


def test_later_layers_win():
    config = parse(Outer, ["inner.rate=0.3", "preset=tiny", "limit=4"], PRESETS)
    assert (config.steps, config.inner.rate, config.limit) == (2, 0.3, 4)
    assert isinstance(config.inner, Inner)


def test_the_last_preset_is_the_one():
    assert parse(Outer, ["preset=tiny", "preset=small"], PRESETS) == Outer(steps=3)


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
        (["rate=3"], r"unknown key 'rate'; did you mean 'inner.rate'\?"),
        (["inner.steps=3"], r"unknown key 'inner.steps'; did you mean 'steps'\?"),
        (["iner.rate=3"], r"unknown key 'iner'; did you mean 'inner'\?"),
        (["zzz=3"], r"unknown key 'zzz'; the keys there are: steps, slides, limit, inner\."),
        (["inner.zzz=3"], r"'inner.zzz'; the keys there are: rate, names, ends, flags\."),
        (["steps=many"], r"^steps=many does not fit; give a whole number\.$"),
        (["steps=[1]"], r"^steps=\[1\] does not fit; give a whole number\.$"),
        (["steps=???"], r"^steps=\?\?\? is no value; give one, or leave steps out"),
        (["limit=x"], r"^limit=x does not fit; give a whole number or null\.$"),
        (["inner.names={a: 1}"], r"^inner.names=.* does not fit; give a list such as \[a\]\.$"),
        (["inner.flags=[x,y]"], r"^inner.flags=\[x,y\] does not fit; give a list such as \[true\]"),
        (["limit=4", "inner.ends=[0.5]"], r"^inner.ends=\[0.5\] does not fit; give a list of 2 "),
        (["inner.ends=[a,null]"], r"^inner.ends=\[a,null\] does not fit; .* \[0.5,0.5\]\.$"),
        (["inner=3"], r"^inner=3 does not fit; give its keys one by one, such as inner.rate\.$"),
        (["preset="], "no preset ''; choose one of: small, tiny"),
        (["steps"], "'steps' is not of the form key=value; keys: steps, slides"),
        (["preset=huge"], "no preset 'huge'; choose one of: small, tiny"),
    ],
)
def test_an_error_names_the_key_and_the_cure(words, says):
    with pytest.raises(UserError, match=says):
        parse(Outer, words, PRESETS)


def test_what_must_be_given_is_named():
    with pytest.raises(UserError, match=r"^data, out must be given; give data=\.\.\. out=\.\.\.$"):
        parse(Placed, ["steps=3"], {})
    with pytest.raises(UserError, match=r"^out must be given; give out=\.\.\.$"):
        parse(Placed, ["data=x"], {})


def refusal(path):
    """What is said against a place; nothing where it will do."""
    try:
        require_place("out", path)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "^out= is empty; name a folder"),
        ("  ", "is empty; name a folder"),
        ("file://", "is empty; name a folder"),
        ("s3://", "^out=s3:// names no bucket"),
        ("s3:///folder", "names no bucket"),
    ],
)
def test_a_place_that_is_none_is_refused(path, says):
    assert re.search(says, refusal(path))


@pytest.mark.parametrize("path", ["a", "/a", "s3://b", "s3://b/c", "file:///a", "owner/name"])
def test_a_place_is_taken(path):
    assert refusal(path) == ""
