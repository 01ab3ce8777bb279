"""Orders travel as JSON and are refused at the boundary."""

import json

import numpy as np
import pytest

from raylarge.errors import UserError
from raylarge.geometry import Patch, Scale, batches, guide_scale, origins, spans, windows
from raylarge.order import Condition, parse
from raylarge.sampling.validation import check

PATCH = Patch(side_px=64, factor=4, channels=3, scales=4)
GRID = np.arange(2 * 3 * 5).reshape(2, 3, 5).astype(np.float16)
NAN = float("nan")


def test_an_order_survives_json():
    condition = Condition.of(GRID).plain()
    order = parse({"size": "128x192", "recipe": "released", "condition": condition})
    again = parse(json.loads(json.dumps(order.as_json())))
    assert again == order
    assert again.digest == order.digest
    assert np.array_equal(again.condition.grid(), GRID)
    assert parse({**order.as_json(), "seed": 1}).digest != order.digest


def test_the_recipe_fills_what_is_left_open():
    order = parse({"size": 64, "recipe": "released", "sampler": {"steps": 7}})
    assert (order.sampler.steps, order.sampler.corrections, order.sampler.guidance) == (7, 10, 3.0)
    assert parse({"size": 64}).sampler.steps == 50


@pytest.mark.parametrize(("size", "k"), [(64, 0), (128, 1), ("64x192", 2), (512, 3)])
def test_the_guide_covers_the_canvas(size, k):
    assert parse({"size": size}).guide(PATCH) == Scale(k)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 100}, "multiples of the patch side 64"),
        ({}, "multiples of the patch side 64"),
        ({"size": 1 << 20}, "from 0 to 131072"),
        ({"size": 1024}, "the largest side is 512"),
        ({"size": 512, "scale": 1}, "the largest side is 256"),
        ({"count": 3, "scale": 4}, "scales 0 to 3"),
        ({"size": 64, "sampler": {"derivative": "exact"}}, "must be one of: jvp, difference"),
        ({"size": 64, "sampler": {"steps": 0}}, "must be from 1 to 999"),
        ({"size": 64, "batch": 0}, "must be from 1 to 1024"),
        ({"size": 64, "seed": -1}, "seed=-1: it must be from 0 to"),
        ({"size": 64, "sampler": {"guidance": -1}}, "guidance=-1.0: it must be from 0 to 100"),
        (
            {"size": 64, "sampler": {"correction_lr": float("nan")}},
            "correction_lr=nan does not fit; give a number",
        ),
        ({"size": 64, "sampler": {"guidance": float("inf")}}, "guidance=inf does not fit"),
        ({"size": 64, "sampler": {"eta": 1.5}}, "eta=1.5: it must be from 0 to 1"),
        ({"size": 64, "sampler": {"correct_every": 0}}, "correct_every=0: it must be from 1 to"),
        ({"size": 64, "sampler": {"steps": 1000}}, "steps=1000: it must be from 1 to 999"),
        ({"size": 64, "condition": Condition.of(GRID[:1, :1] * NAN).plain()}, "NaN"),
        ({"size": 128, "condition": {"kind": "embeddings", "shape": (2, 2, 4)}}, "float16 values"),
        ({"size": 128, "condition": Condition.of(GRID).plain()}, r"takes \(2, 2\)"),
    ],
)
def test_what_a_bundle_cannot_do_is_refused(values, says):
    with pytest.raises(UserError, match=says):
        check(parse(values), PATCH)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sise": 64}, "did you mean 'size'"),
        ({"size": "big"}, "give a number of pixels"),
        ({"size": "0x200"}, "size=0x200 does not fit; give a number of pixels"),
        ({"size": [64, 0]}, "give a number of pixels"),
        ({"recipe": "mine"}, "recipe=mine: it must be one of: paper, released"),
        ({"condition": {"kind": "magic"}}, "null, cdm, embeddings, inverted, prior"),
        ({"condition": {"fine": "magic"}}, "null, independent, inversion, prior"),
        ({"condition": {"draw": "magic"}}, "draw=magic: it must be one of: paper, released"),
        ({"seed": "x"}, "seed=x does not fit; give a whole number"),
        ({"sampler": {"interval": [0.5]}}, "interval=.0.5. does not fit; give a list of 2"),
        (
            {"sampler": {"interval": [0.5, 0.2]}},
            "must be two shares that rise",
        ),
    ],
)
def test_what_is_no_order_is_refused(values, says):
    with pytest.raises(UserError, match=says):
        parse(values)


def test_null_of_json_is_the_word_where_that_is_a_choice():
    assert parse({"size": 64, "condition": {"kind": None, "fine": None}}) == parse({"size": 64})
    with pytest.raises(UserError, match="draw=null does not fit"):
        parse({"size": 64, "condition": {"draw": None}})
    assert parse(parse({"count": 2}).as_json()).size == (0, 0)


def test_damaged_embeddings_are_refused():
    condition = Condition.of(GRID)
    with pytest.raises(UserError, match="float16 values"):
        condition.replace(data=condition.data[:-8]).grid()


def test_windows_cover_and_batches_are_full():
    assert origins(100, 64, 16) == [0, 16, 32, 36]
    assert windows((64, 80), 64, 16) == [(0, 0), (0, 16)]
    assert batches(5, 2) == [(0, 1), (2, 3), (4, 4)]
    assert spans(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert guide_scale((65, 1), 64) == Scale(1)
    with pytest.raises(ValueError, match="leave gaps"):
        origins(100, 64, 65)
