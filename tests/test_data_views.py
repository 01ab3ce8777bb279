"""Views and random crops of the base scale."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raylarge import images, storage, tables
from raylarge.data.prepare import prepare
from raylarge.data.tile_candidates import TileConfig
from raylarge.data.tile_table import slides_of
from raylarge.data.views import CROPS_PER_VIEW, view_of
from raylarge.errors import UserError
from raylarge.models import ssl
from raylarge.report import Report
from raylarge.slides.reader import open_slide


@pytest.fixture(scope="module")
def count():
    return CROPS_PER_VIEW + 5


@pytest.fixture
def prepared(tiny_prepare, tmp_path, count):
    settings = tiny_prepare(tile={"base_crops": count})
    prepare(settings, Report(str(tmp_path / "report.json")))
    return settings


def test_base_crops_are_embedded_tiles_of_further_views_away_from_held_out_rows(prepared, count):
    views = {one.slide_id: one for one in slides_of(prepared.out) if one.view}
    assert sorted(one.view for one in views.values()) == [1, 2]
    rows = tables.rows(prepared.out, "examples").to_pylist()
    crops = [row for row in rows if row["slide_id"] in views]
    assert len(crops) == count
    assert {(row["scale"], row["split"]) for row in crops} == {(0, "train")}
    encoder, side = ssl.load("toy"), prepared.tile.patch_px
    edges = [row["row"] for row in rows if row["split"] == "val" and row["slide_id"] not in views]
    for row in crops:
        slide = views[row["slide_id"]]
        with open_slide(slide.path, view=view_of(slide, prepared.tile)) as reader:
            box = (row["row"] * side, row["column"] * side, side, side)
            pixels = reader.read(*box)
            top, _, height, _ = reader.view.source(box, reader.whole_px)
        assert (images.from_bytes(row["image"]) == pixels).all()
        assert top + height <= min(edges) * side
        own = encoder(np.stack([pixels] * prepared.embed.batch))[0]
        assert np.allclose(np.array(row["grid"], np.float16), own, atol=1e-3)
    origins = {view_of(slide, prepared.tile).shift_px for slide in views.values()}
    assert len(origins) == 2
    assert (0, 0) not in origins


def test_base_crops_leave_the_rows_of_the_slides_as_they_are(prepared, tiny_prepare, tmp_path):
    plain = tiny_prepare(out=str(tmp_path / "plain"))
    prepare(plain, Report(str(tmp_path / "plain.json")))
    views = [one.slide_id for one in slides_of(prepared.out) if one.view]
    table = tables.rows(prepared.out, "examples")
    own = table.filter(pc.invert(pc.is_in(table["slide_id"], pa.array(views))))
    assert own == tables.rows(plain.out, "examples")
    assert "base_crops" not in storage.read_json(f"{plain.out}/tile.json")["config"]["tile"]
    assert prepare(prepared, Report(str(tmp_path / "again.json")))["tile"]["made"] == 0
    assert all(Path(prepared.out, "qc", f"{name}.png").exists() for name in views)


def test_base_crops_need_the_base_scale_and_formats_with_views():
    with pytest.raises(UserError, match=r"tile\.base_crops=3: it must be 0 unless scales has 0"):
        TileConfig(scales=[1, 2], base_crops=3).check()
    with pytest.raises(UserError, match=r"tile\.base_crops=3: this works on tables of one view"):
        TileConfig(base_crops=3).require_one_view()
