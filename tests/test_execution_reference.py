"""A region of a slide: which is taken, which would fit, and what else there is to choose."""

import numpy as np
import pyarrow as pa
import pytest

from raylarge import order, schema, storage
from raylarge.data.prepare import prepare
from raylarge.data.tile_table import slides_of
from raylarge.errors import UserError
from raylarge.execution import reference
from raylarge.execution.reference import find_region
from raylarge.geometry import Patch
from raylarge.report import Report

PATCH = Patch(side_px=64, factor=4, channels=3, scales=3)


def write_slides(folder, slides):
    """EMBEDDINGS of slides whose tiles of an L are embedded: 5 x 5 of 8 x 7, and a strip."""
    valid = np.zeros((8, 7), bool)
    valid[2:7, 1:6] = True
    valid[2:4, 1:7] = True
    parts = []
    for slide in slides:
        columns = {
            "slide_id": [slide] * 8,
            "row": list(range(8)),
            "columns": [7] * 8,
            "valid": list(valid),
            "embedding": list(np.ones((8, 7 * 4), np.float16)),
        }
        parts.append({"part": f"embeddings/{slide}-0000.parquet"})
        table = schema.check(pa.table(columns), schema.EMBEDDINGS)
        storage.write_table(f"{folder}/{parts[-1]['part']}", table)
    storage.write_json(f"{folder}/embed.json", {"verb": "embed", "parts": parts})
    return str(folder)


def found(reference, at=None, **values):
    return find_region(reference, at, order.parse(values), PATCH)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_slides(tmp_path_factory.mktemp("data"), [f"s{i:02d}" for i in range(20)])


def test_a_region_says_where_it_lies_and_its_neighbour_can_be_asked_for(data):
    first = found(data, size="128x192")
    assert first.facts == {"slide": "s00", "row": 2, "column": 1, "rows": 2, "columns": 3}
    assert str(first) == ("slide s00, at=2,1 (2 x 3 base tiles; its right neighbour is at=2,4)")
    assert found(data, (2, 4), size="128x192").facts["column"] == 4
    assert found(f"{data}:s07", (2, 1), size="128x192").slide == "s07"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": 512},
         r"nowhere has 8 x 8 .*order\.size=320 with order\.algorithm=strided, or order\.size=256 "),
        ({"size": 512, "algorithm": "strided"}, r"largest square gives order\.size=320; or choose"),
        ({"size": 256, "scale": 1}, r"nowhere has 8 x 8 .*gives order\.size=128; or choose"),
        ({"size": 128, "scale": 3}, r"nowhere has 16 x 16 .*a lower order\.scale"),
        ({"size": 8192}, "nowhere has 128 x 128"),
        ({"size": 32}, "smaller than a patch"),
    ],
)  # fmt: skip
def test_a_region_too_large_comes_with_the_largest_size(data, values, says):
    with pytest.raises(UserError, match=says):
        found(data, **values)
    if says.startswith("nowhere has 8 x 8 .*order"):
        assert found(data, size=320).facts["rows"] == 5


def test_a_slide_that_is_not_there_lists_some_that_are(data):
    with pytest.raises(UserError, match=r"no slide 's7'; it has: s\d\d, .* and 12 more\.") as error:
        found(f"{data}:s7", size=64)
    assert len(str(error.value)) < len(data) + 120


@pytest.mark.parametrize("at", [(0, 0), (-1, 0), (6, 5), (100, 100)])
def test_a_place_without_embeddings_says_where_there_are_some(data, at):
    with pytest.raises(UserError, match="it has some in rows 2 to 6, columns 1 to 6"):
        found(data, at, size=128)


def test_a_view_is_no_reference_unless_it_is_named(tiny_prepare, tmp_path):
    config = tiny_prepare(verbs="tile,embed", tile={"views": 4})
    prepare(config, Report(str(tmp_path / "report.json")))
    views = {one.slide_id: one.view for one in slides_of(config.out)}
    assert views[reference._parse(config.out)[1]] == 0
    for slide in views:
        assert reference._parse(f"{config.out}:{slide}")[1] == slide
