"""Configuration: defaults < preset < overrides, and errors that help."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raylarge.config import MISSING, build, number, parse, plain, require_place
from raylarge.config.places import SUBMITTED
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


@dataclass(frozen=True)
class Typed:
    """Every kind of field.

    Attributes:
        text: of any form. Example: a b.
        whole: within bounds.
    """

    text: str = ""
    maybe: str | None = None
    whole: int = number(1, 0, 1 << 40)
    real: float = 0.5  # any number
    flag: bool = False
    rates: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Names of columns."""
    inner: Inner = field(default_factory=Inner)
    order: dict[str, Any] = field(default_factory=dict, metadata={"keys": Inner})


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


WORDS = ["*.svs", "{a}.svs", "s3://b/*.svs", "a.svs,b b.svs", "&x", "", "img #2", "2024_01", "012"]
WORDS += [
    "on",
    "12:30:00",
    "'a'",
    '"a"',
    " a ",
    "null",
    "~",
    "???",
    "${oc.env:HOME}",
    "[a]",
    "a: b",
]


@pytest.mark.parametrize("value", WORDS)
@pytest.mark.parametrize("key", ["text", "maybe"])
def test_a_text_is_the_word_as_it_stands(key, value):
    config = parse(Typed, [f"{key}={value}"], {})
    assert getattr(config, key) == value
    assert build(Typed, plain(config)) == config


@given(st.text(st.characters(exclude_characters="\0")))
@example("\udce9.svs")
def test_any_text_survives(value):
    assert parse(Typed, [f"text={value}"], {}).text == value
    if "," not in value and value:
        assert parse(Typed, [f"names=[{value}]"], {}).names == [value]


@given(st.integers(0, 1 << 40), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive(whole, real):
    words = [f"whole={whole}", f"real={real}", f"rates=[{real}, {whole}]"]
    config = parse(Typed, words, {})
    assert (config.whole, config.real, config.rates) == (whole, real, [real, whole])


@settings(max_examples=300)
@given(
    st.sampled_from(["whole", "real", "flag", "rates", "inner.ends", "order.rate", "inner", "zz"]),
    st.text("0123456789+-._exXobnaif[], rtu:#'\u0663\ud800\n", max_size=12),
)
def test_any_other_word_is_refused_in_one_line(key, value):
    config, message = None, ""
    try:
        config = parse(Typed, [f"{key}={value}"], {})
    except UserError as error:
        message = str(error)
    assert message.isprintable()
    if config is not None:
        assert json.dumps(plain(config), allow_nan=False)
        assert not set(value) & set("_xXob:#'\u0663\ud800\n")


ODD = [
    "1_000",
    "0x10",
    "0o17",
    "012",
    "1:30",
    "inf",
    "nan",
    "1e999",
    "",
    " 1",
    "1e3.",
    "null",
    "9" * 400,
]


@pytest.mark.parametrize("value", [*ODD, "1.0", "1e3", "true"])
def test_no_whole_number(value):
    with pytest.raises(
        UserError, match=r"^whole=.* does not fit; give a whole number such as 3\.$"
    ):
        parse(Typed, [f"whole={value}"], {})


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("key", ["real", "inner.rate", "order.rate"])
def test_no_number(key, value):
    with pytest.raises(UserError, match=rf"^{key}=.* does not fit; give a number such as 0.5\.$"):
        parse(Typed, [f"{key}={value}"], {})


@pytest.mark.parametrize("value", ["True", "yes", "on", "1", "", "null"])
def test_no_flag(value):
    with pytest.raises(UserError, match=r"^flag=.* does not fit; give true or false\.$"):
        parse(Typed, [f"flag={value}"], {})


def test_a_mapping_holds_typed_keys_of_another_dataclass():
    words = ["order.rate=1e-3", "order.names=[a b,012]", "order.ends=[0, 1]"]
    order = {"rate": 1e-3, "names": ("a b", "012"), "ends": (0.0, 1.0)}
    assert parse(Typed, words, {}).order == order


def test_a_bound_names_key_and_range():
    with pytest.raises(UserError, match=r"^whole=-1: it must be from 0 to 1099511627776\.$"):
        parse(Typed, ["whole=-1"], {})


@pytest.mark.parametrize("words", [["--help"], ["text=a", "-h"]])
def test_help_describes_every_key(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as end:
        parse(Typed, words, {"tiny": {}, "small": {}}, "What it does.")
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert max(map(len, text.splitlines())) <= 60
    assert text.startswith("What it does.")
    for line in (
        "preset=NAME\n    One of: tiny, small",
        "text=  (empty by default)\n    Text. Of any form.\n    example: 'text=a b'",
        "whole=1\n    A whole number, from 0 to 1099511627776. Within bounds.",
        "real=0.5\n    A number. Any number.\n    example: real=0.5",
        "A list. Names of columns.",
        "maybe=null",
        "inner.ends=[0.0,1.0]",
        "order.rate=0.5",
    ):
        assert line in text


def test_what_must_be_given_says_so_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse(Placed, ["--help"], {})
    assert "data=...  (must be given)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stepps=3"], r"unknown key 'stepps'; did you mean 'steps'\?"),
        (["inner.rat=3"], r"unknown key 'inner.rat'; did you mean 'inner.rate'\?"),
        (["rate=3"], r"unknown key 'rate'; did you mean 'inner.rate'\?"),
        (["inner.steps=3"], r"unknown key 'inner.steps'; did you mean 'steps'\?"),
        (["iner.rate=3"], r"unknown key 'iner.rate'; did you mean 'inner.rate'\?"),
        (["zzz=3"], r"unknown key 'zzz'; the keys there are: steps, slides, limit, inner\."),
        (["inner.zzz=3"], r"'inner.zzz'; the keys there are: rate, names, ends, flags\."),
        (["steps=many"], r"^steps=many does not fit; give a whole number such as 3\.$"),
        (["steps=[1]"], r"^steps=\[1\] does not fit; give a whole number such as 3\.$"),
        (["steps=???"], r"^steps=\?\?\? does not fit; give a whole number such as 3\.$"),
        (["limit=x"], r"^limit=x does not fit; give a whole number such as 3 or null\.$"),
        (["inner.names={a: 1}"], r"^inner.names=.* does not fit; give a list such as \[a\]\.$"),
        (["inner.flags=[x,y]"], r"^inner.flags=\[x,y\] does not fit; give a list such as \[true\]"),
        (["limit=4", "inner.ends=[0.5]"], r"^inner.ends=\[0.5\] does not fit; give a list of 2 "),
        (["inner.ends=[a,null]"], r"^inner.ends=\[a,null\] does not fit; .* \[0.5,0.5\]\.$"),
        (["heads=3"], r"unknown key 'heads'; the keys there are"),
        (["threads=3"], r"unknown key 'threads'; the keys there are"),
        (["steps.a=3"], r"unknown key 'steps.a'; the keys there are"),
        (["a..b=3"], r"unknown key 'a..b'; the keys there are"),
        (["=3"], r"unknown key ''; the keys there are"),
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


@dataclass(frozen=True)
class Job:
    out: str = "out/here"
    slides: str = ""
    table: str = ""
    inner: Outer = field(default_factory=Outer)


JOB = json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}, "metadata": {}})


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["slides=/a.svs"], "out=out/here"),  # a default too
        (["out=data"], "out=data"),
        (["out=./data"], "out=./data"),
        (["out=file://data"], "out=file://data"),
        (["out=~/data"], "out=~/data"),
        (["out=/a", "slides=/b/*.svs,c/*.svs"], r"slides=c/\*.svs"),
        (["out=/a", "inner.slides=c"], "inner.slides=c"),
    ],
)
def test_a_submitted_job_refuses_folders_in_its_temporary_copy(words, key, monkeypatch):
    assert parse(Job, words, {})
    monkeypatch.setenv(SUBMITTED, JOB)
    with pytest.raises(UserError, match=rf"^{key} is relative, .*absolute path .*s3://"):
        parse(Job, words, {})


def test_a_submitted_job_takes_places_that_last(monkeypatch):
    monkeypatch.setenv(SUBMITTED, JOB)
    words = ["out=s3://b/c", "slides=/a b/*.svs,file:///c.svs,https://d/e.svs?f=g", "table=a.csv"]
    assert parse(Job, words, {}).table == "a.csv"
    with pytest.raises(UserError, match=r"^out=data is relative"):
        require_place("out", "data")


def test_ray_marks_a_submitted_job_by_that_variable():
    constants = pytest.importorskip("ray._private.runtime_env.constants")
    assert constants.RAY_JOB_CONFIG_JSON_ENV_VAR == SUBMITTED
