"""Random words of the command line and JSON orders: their exact meaning, or a refusal by key."""

import json
import math

import numpy as np
import pytest
from mutations import Refused, numbers, outcome, pick, texts

from raylarge import order
from raylarge.config import parse
from raylarge.data.prepare import Prepare
from raylarge.execution.config import SampleConfig
from raylarge.geometry import Patch
from raylarge.sampling import joint
from raylarge.train.config import Train

TEXT_KEYS = [
    (Prepare, "slides"),
    (Prepare, "bundle"),
    (Prepare, "tile.mask"),
    (Prepare, "tile.table"),
    (Prepare, "tile.patient"),
    (Prepare, "tile.salt"),
    (Prepare, "tile.scene"),
    (Prepare, "embed.encoder"),
    (Train, "logs"),
    (Train, "mil.label"),
    (SampleConfig, "reference"),
    (SampleConfig, "text"),
    (SampleConfig, "negative"),
]
NUMBER_KEYS = [  # with the least that the key may be, and the most
    (Prepare, "tile.patch_px", int),
    (Prepare, "tile.crops", int),
    (Prepare, "tile.seed", int),
    (Prepare, "tile.val_fraction", float),
    (Prepare, "tile.mpp", float),
    (Prepare, "embed.batch", int, 1),
    (Prepare, "workers", int),
    (Train, "steps", int),
    (Train, "lr", float),
    (Train, "clip", float),
    (SampleConfig, "threads", int, 1),
    (SampleConfig, "workers", int, 0),
    (SampleConfig, "tflops", float, 1e-300),
]
REQUIRED = {
    Prepare: ["out=data"],
    Train: ["model=ldm", "data=data", "out=bundle"],
    SampleConfig: ["bundle=bundle", "out=image"],
}


def value_of(schema, key, word):
    config = parse(schema, [*REQUIRED[schema], f"{key}={word}"], {})
    for part in key.split("."):
        config = getattr(config, part)
    return config


def typed(number, kind):
    """The number, where a field of a type takes it; else None."""
    if number is None or (kind is int and isinstance(number, float)):
        return None
    return kind(number)


@pytest.mark.parametrize("seed", range(60))
def test_text_stands_as_it_is(seed):
    rng = np.random.default_rng([1, seed])
    schema, key = pick(rng, TEXT_KEYS)
    word = texts(rng)
    if schema is Train and key == "logs" and word == "null":
        return  # the field may have no value
    assert outcome(lambda: value_of(schema, key, word)) == word


@pytest.mark.parametrize("seed", range(90))
def test_numbers_are_plain_decimal_numbers(seed):
    rng = np.random.default_rng([2, seed])
    schema, key, kind, *bounds = pick(rng, NUMBER_KEYS)
    word, number = numbers(rng)
    value = typed(number, kind)
    low, high = (*bounds, -math.inf, math.inf)[:2] if not bounds else (*bounds, math.inf)[:2]
    expected = value
    if value is None:
        expected = Refused(f"{key}=", "a whole number" if kind is int else "a number such as 0.5")
    elif not low <= value <= high:
        expected = Refused(f"{key.rpartition('.')[2]}=", "it must be")
    assert outcome(lambda: value_of(schema, key, word)) == expected


@pytest.mark.parametrize("seed", range(40))
def test_lists_hold_plain_numbers(seed):
    rng = np.random.default_rng([3, seed])
    pairs = [numbers(rng) for _ in range(int(rng.integers(1, 4)))]
    pairs = [(word, number) for word, number in pairs if not set(word) & set(" \n,[]")]
    key, kind = pick(rng, [("tile.scales", int), ("tile.tissue", float), ("tile.bands", int)])
    word = f"[{pick(rng, [',', ', ', ' ,'])[:3].join(word for word, _ in pairs)}]"
    values = [typed(number, kind) for _, number in pairs]
    expected = Refused(f"{key}=", "a list") if None in values else values
    assert outcome(lambda: value_of(Prepare, key, word)) == expected


@pytest.mark.parametrize("seed", range(30))
def test_a_place_is_two_plain_numbers(seed):
    rng = np.random.default_rng([4, seed])
    pairs = [numbers(rng) for _ in range(pick(rng, [2, 2, 2, 1, 3]))]
    pairs = [(word, number) for word, number in pairs if not set(word) & set(" \n,[]")]
    numbers_, word = [number for _, number in pairs], ",".join(word for word, _ in pairs)
    whole = len(pairs) == 2 and all(type(n) is int for n in numbers_)
    fine = whole and all(0 <= n <= 1 << 17 for n in numbers_)
    word = pick(rng, [word, f"[{word}]"])
    expected = (
        tuple(numbers_) if fine else Refused("at=", "must be" if whole else "row and a column")
    )
    assert outcome(lambda: value_of(SampleConfig, "at", word)) == expected


RANGES = {  # what the documentation of the order says
    "seed": (0, (1 << 64) - 1),
    "count": (0, 1 << 31),
    "scale": (0, 30),
    "batch": (1, 1024),
    "sampler.steps": (1, 999),
    "sampler.corrections": (0, 1000),
    "strided.share": (1, 1024),
    "source.octaves": (1, 30),
}


def order_of(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    values = json.loads(json.dumps({"size": 512, **value}))
    made = order.parse(values)
    assert order.parse(made.as_json()) == made
    for part in key.split("."):
        made = getattr(made, part)
    return made


ODD = (True, False, None, 1.5, 3.0, "", "ten", "0x10", "1_0", "１", [], [1], {}, {"a": 1}, "1e2")


@pytest.mark.parametrize("seed", range(60))
def test_whole_numbers_of_an_order(seed):
    rng = np.random.default_rng([5, seed])
    key = pick(rng, list(RANGES))
    low, high = RANGES[key]
    fine = [low, high, min(high, low + int(rng.integers(1000)))]
    beyond = [low - 1, high + 1, -(1 << 62), 1 << 80, 10**400]
    value, right = pick(
        rng, [(one, True) for one in fine] + [(one, False) for one in (*beyond, *ODD)]
    )
    assert outcome(lambda: order_of(key, value)) == (
        value if right else Refused(key.split(".")[-1])
    )


SIZES = [
    (512, (512, 512)),
    ("512", (512, 512)),
    ("512x768", (512, 768)),
    ([512, 768], (512, 768)),
    ("[512,768]", (512, 768)),
    (131072, (131072, 131072)),
    *((one, None) for one in (131073, -1, "512X768", "512×768", "512x", "x512", "512x512x512")),
    *((one, None) for one in (512.0, 512.5, True, None, "5e2", "0x200", "5_12", "٥١٢", 1e400)),
    *((one, None) for one in ([], {}, [[512]], [1, 2, 3], "512 768", "512*768", "-512x512")),
    *((one, None) for one in ("[512", "", "(512,512)")),
]


@pytest.mark.parametrize("size", range(len(SIZES)))
def test_sizes_of_an_order(size):
    value, expected = SIZES[size]
    assert outcome(lambda: order_of("size", value)) == (expected or Refused("size"))


WORDS = {
    "recipe": ("paper", "released"),
    "algorithm": ("joint", "strided", "superres"),
    "sampler.solver": ("ddim", "plms", "dpm++", "unipc"),
    "sampler.constraint": ("window", "mosaic"),
    "condition.kind": ("null", "cdm", "embeddings", "inverted", "prior"),
    "condition.fine": ("null", "independent", "inversion", "prior"),
}


@pytest.mark.parametrize("seed", range(40))
def test_words_of_an_order(seed):
    rng = np.random.default_rng([6, seed])
    key = pick(rng, list(WORDS))
    word = pick(rng, WORDS[key])
    odd = [word.upper(), f" {word}", f"{word}\n", word[:-1], f"{word}s", None, 0, [word], {word: 1}]
    value = pick(rng, [word, *odd, "\ud800", "é" * 5000, True])
    expected = word if value == word else Refused(key.split(".")[-1])
    if value is None and "null" in WORDS[key]:
        expected = "null"  # JSON's own null names that kind, too
    assert outcome(lambda: order_of(key, value)) == expected


@pytest.mark.parametrize("seed", range(30))
def test_a_key_that_is_not_there_is_named(seed):
    rng = np.random.default_rng([7, seed])
    known = pick(rng, [*RANGES, *WORDS])
    odd = [known[:-1], f"{known}s", f"{known} ", known.upper(), f"{known}.x", "\udcff", "__class__"]
    key = pick(rng, [*odd, "sampler.__init__", "é", "x" * 3000])
    last = key.split(".")[-1] if len(key) < 99 and key.isprintable() else ""
    assert outcome(lambda: order_of(key, 1)) == Refused(last)
    words = ["bundle=b", "out=o", f"order.{key}=1"]
    assert outcome(lambda: parse(SampleConfig, words, {})) == Refused(last)


UNREAD = [
    ({"count": 2, "algorithm": "strided"}, "order.algorithm"),
    ({"count": 2, "algorithm": "superres", "condition": {"kind": "inverted"}}, "order.algorithm"),
    ({"count": 2, "refine": True}, "order.refine"),
    ({"count": 2, "levels": [1, 0]}, "order.levels"),
    ({"size": 128, "algorithm": "strided", "levels": [1, 0]}, "order.levels"),
    ({"size": 128, "algorithm": "strided", "refine": True}, "order.refine"),
    ({"size": 128, "source": {"image": "iVBORw0KGgo="}}, "order.source.image"),
    ({"size": 128, "condition": {"data": "AAAAPA==", "shape": [2]}}, "order.condition.data"),
    (
        {"size": 128, "condition": {"kind": "cdm", "data": "AAAAPA==", "shape": [2]}},
        "order.condition.data",
    ),
]


@pytest.mark.parametrize("index", range(len(UNREAD)))
def test_what_an_order_would_not_read_is_refused(index):
    values, key = UNREAD[index]
    patch = Patch(side_px=64, factor=4, channels=3, scales=4)
    assert outcome(lambda: joint.plan(order.parse(values), patch)) == Refused(
        key, "would not be used"
    )
