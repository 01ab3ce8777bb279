"""Configuration: defaults < preset < overrides, and errors that help."""

import json
import pickle
import re
from typing import Annotated, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from raylarge.config import Config, Form, build, parse, plain, read_numbers, require_place
from raylarge.config.places import SUBMITTED
from raylarge.errors import UserError


class Inner(Config):
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)
    ends: tuple[float, float] = (0.0, 1.0)
    flags: tuple[bool, ...] = ()


class Outer(Config):
    steps: int = 10
    slides: str = ""
    limit: int | None = None
    inner: Inner = Inner()


class Placed(Outer):
    data: str
    out: str


Size = Annotated[
    tuple[Annotated[int, Field(ge=1, le=512)], ...],
    Form("a number of pixels such as 64 or 64x96", lambda value: read_numbers(value, "x")),
]


class Typed(Config):
    """Every kind of field."""

    text: str = Field("", examples=["a b"])
    """of any form"""
    maybe: str | None = None
    whole: int = Field(1, ge=0, le=1 << 40)
    """Within bounds."""
    share: float = Field(0.5, gt=0, lt=1)
    real: float = Field(0.5, description="any number")
    flag: bool = False
    kind: Literal["null", "cdm"] = "null"
    zero: Literal[0, 1, 2] | None = None
    size: Size = (64,)
    rates: list[float] = Field([])
    names: list[str] = Field([])
    """Names of columns."""
    inner: Inner = Inner()
    fast: Inner = Inner(rate=0.9)
    """Like `inner`, but fast."""

    @model_validator(mode="after")
    def _check(self):
        if self.kind == "cdm" and not self.text:
            raise ValueError("kind=cdm needs a text; give text=...")
        return self


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
    st.sampled_from(["whole", "real", "flag", "rates", "inner.ends", "fast.rate", "inner", "zz"]),
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
@pytest.mark.parametrize("key", ["real", "inner.rate", "fast.rate"])
def test_no_number(key, value):
    with pytest.raises(UserError, match=rf"^{key}=.* does not fit; give a number such as 0.5\.$"):
        parse(Typed, [f"{key}={value}"], {})


@pytest.mark.parametrize("value", ["True", "yes", "on", "1", "", "null"])
def test_no_flag(value):
    with pytest.raises(UserError, match=r"^flag=.* does not fit; give true or false\.$"):
        parse(Typed, [f"flag={value}"], {})


def test_a_section_keeps_what_its_field_sets_by_default():
    config = parse(Typed, ["fast.names=[a b,012]", "fast.ends=[0, 1]"], {})
    assert config.fast == Inner(rate=0.9, names=("a b", "012"), ends=(0.0, 1.0))
    assert build(Typed, {"fast": config.fast}, {"fast": {"rate": "1e-3"}}).fast.rate == 1e-3


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("whole=-1", r"^whole=-1: it must be from 0 to 1099511627776\.$"),
        ("share=0", r"^share=0\.0: it must be above 0, below 1\.$"),
        ("kind=magic", r"^kind=magic: it must be one of: null, cdm\.$"),
        ("zero=7", r"^zero=7: it must be one of: 0, 1, 2\.$"),
        ("zero=x", r"^zero=x does not fit; give a whole number such as 3 or null\.$"),
        ("size=64x999", r"^size=64x999: each must be from 1 to 512\.$"),
        ("size=big", r"^size=big does not fit; give a number of pixels such as 64 or 64x96\.$"),
        ("kind=cdm", r"^kind=cdm needs a text; give text=\.\.\.$"),
    ],
)
def test_a_rule_is_named_with_key_and_value(word, says):
    with pytest.raises(UserError, match=says):
        parse(Typed, [word], {})


def test_a_choice_named_null_is_jsons_null():
    assert build(Typed, {"kind": None}).kind == "null"


def test_keyword_arguments_are_validated_like_words():
    assert Typed(size="8x9", inner={"rate": 2}) == parse(Typed, ["size=[8,9]", "inner.rate=2"], {})
    with pytest.raises(UserError, match=r"^inner.rate=x does not fit; give a number"):
        Typed(inner={"rate": "x"})
    with pytest.raises(UserError, match=r"^whole=-1: it must be from 0"):
        Typed().replace(whole=-1)


def test_a_changed_copy_keeps_the_rest_and_survives_pickling():
    config = Typed(text="a", inner={"rate": 2}).replace(whole=5)
    assert config == Typed(text="a", inner=Inner(rate=2.0), whole=5)
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.set_values().keys() == {"text", "inner", "whole"}


def test_nothing_can_be_assigned():
    with pytest.raises(ValueError, match="frozen"):
        Typed().whole = 3


def test_the_json_schema_says_what_the_fields_say():
    properties = Typed.model_json_schema()["properties"]
    assert properties["whole"]["minimum"] == 0
    assert properties["whole"]["description"] == "Within bounds."
    assert {"type": ["string", "integer"]} in properties["size"]["anyOf"]


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
        "kind=null\n    Text, one of: null, cdm.\n    example: kind=cdm",
        "size=[64]\n    A number of pixels, each from 1 to 512.",
        "fast.*  Like `inner`, but fast.",
        "fast.rate=0.9",
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


class Job(Config):
    out: str = "out/here"
    slides: str = ""
    table: str = ""
    inner: Outer = Outer()


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
