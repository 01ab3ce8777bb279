from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raylarge import images, schema, storage
from raylarge.data import slide_index, tile
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.qc import regions as qc_regions
from raylarge.data.qc import sheet as qc
from raylarge.data.tile import TileConfig
from raylarge.slides.reader import Slide, open_slide


def table(rows, slide_id="0123456789abcdef"):
    """TILES of (scale, row, column, split, reason)."""
    names = ("scale", "row", "column", "split", "reason")
    found = [dict(zip(names, row, strict=True)) for row in rows]
    more = {"slide_id": slide_id, "patient_id": slide_id, "tissue": 0.5}
    whole = [{**more, **row, "kept": not row["reason"]} for row in found]
    return schema.check(pa.Table.from_pylist(whole, pa.schema(list(schema.TILES))), schema.TILES)


def every(size_px, patch_px, scales):
    """TILES where the whole regular grid is kept."""
    rows = [
        (k, r << k, c << k, "train", "")
        for k in scales
        for r in range(-(-size_px[0] // (patch_px << k)))
        for c in range(-(-size_px[1] // (patch_px << k)))
    ]
    return table(rows)


def has(pixels, ink):
    return bool((pixels == np.array(ink, np.uint8)).all(axis=-1).any())


class Flat:
    """A pyramid of one colour that remembers the largest region that was read."""

    mpp_hints = ()
    icc_profile = None
    notes = ()
    georeference = None

    def __init__(self, size, factors):
        self.sizes = [(-(-size[0] // f), -(-size[1] // f)) for f in factors]
        self.most = 0

    def read_level(self, level, top, left, rows, columns):
        self.most = max(self.most, rows * columns)
        return np.full((rows, columns, 3), 120, np.uint8)

    def close(self):
        pass


@pytest.fixture(scope="module")
def tiled(tiny_slide, tmp_path_factory):
    """A data folder of two slides with telling names, the tiny one and a part of it."""
    folder = tmp_path_factory.mktemp("Prof-Miller-clinic")
    content = Path(tiny_slide).read_bytes()
    for name in ("DOE_JANE.1970.tif", "ROE_RICHARD.tif"):
        (folder / name).write_bytes(content)
    (folder / "table.csv").write_text(
        'slide,patient,mpp,type\nDOE_JANE.1970.tif,p1,0.5,"<b>IDC</b> ""x"" & \'y\'"\n'
    )
    root = str(tmp_path_factory.mktemp("data"))
    config = TileConfig(
        64,
        [0, 1, 2],
        [0.3, 0.2],
        crops=8,
        split="band",
        val_fraction=0.35,
        table=str(folder / "table.csv"),
    )
    tile.run(root, [str(path) for path in sorted(folder.glob("*.tif"))], config, ExecutorConfig())
    return root


def page_of(root):
    return storage.read_bytes(storage.join(root, "qc", "index.html")).decode()


def test_kept_and_rejected_regions_have_their_colours():
    rows = [
        (0, 0, 0, "train", ""),
        (0, 0, 1, "val", ""),
        (0, 0, 2, "test", ""),
        (0, 1, 0, "train", "tissue 0.1 < 0.5"),
        (0, 1, 1, "", "crosses the split"),
        (0, 1, 2, "train", "outside"),
        (0, 2, 0, "fold7", ""),
    ]
    (layer,) = qc_regions.layers(table(rows), 64)
    grey = Image.new("RGB", (150, 150), (200, 200, 200))
    seen = np.asarray(qc_regions.overlay(grey, (192, 192), layer), int)
    for _, r, c, split, why in rows:
        ink = np.array(qc_regions.ink(why.split(" ")[0] if why else split, not why))
        tint = qc_regions.REJECTED_TINT if why else qc_regions.KEPT_TINT
        middle, corner = seen[50 * r + 25, 50 * c + 25], seen[50 * r, 50 * c]
        assert np.abs(middle - (200 + (ink - 200) * tint)).max() <= 1
        assert (corner == (ink if not why else middle)).all()  # rejected ones have no outline
    assert (seen[125, 75] == 200).all()  # no candidate, no colour
    inks = [qc_regions.ink(name, True) for name in ("train", "val", "test", "fold7")]
    inks += [qc_regions.ink(name, False) for name in qc_regions.REASONS]
    assert len(set(inks)) == 7
    assert qc_regions.title("blurred", False) == "blurred"  # a reason that is not known yet


def test_small_tiles_share_one_outline():
    cells = [(0, r, c, "train" if c < 10 else "val", "") for r in range(20) for c in range(20)]
    (layer,) = qc_regions.layers(table(cells), 64)
    white = Image.new("RGB", (100, 100), "white")
    seen = np.asarray(qc_regions.overlay(white, (1280, 1280), layer))
    blue = (seen == qc_regions.SPLITS["train"]).all(axis=-1)
    assert blue[:, 0].all()
    assert blue[0, :50].all()
    assert blue[:, 49].all()
    assert not blue[1:-1, 1:49].any()
    assert (seen[:, 50] == qc_regions.SPLITS["val"]).all()


def test_random_crops_are_dashed_and_leave_the_grid_alone():
    rows = [(1, 0, 0, "train", ""), (1, 3, 3, "val", ""), (1, 1, 5, "train", "tissue 0 < 1")]
    (layer,) = qc_regions.layers(table(rows), 64)
    assert layer.regular.tolist() == [True, False, False]
    grey = Image.new("RGB", (160, 160), (200, 200, 200))
    seen = np.asarray(qc_regions.overlay(grey, (512, 512), layer))
    line = seen[60, 60:100]
    amber = (line == qc_regions.SPLITS["val"]).all(axis=-1)
    assert amber.sum() == pytest.approx(20, abs=4)
    assert (line[~amber] == 255).all()
    assert (seen[80, 80] == 200).all()
    assert (seen[20:60, 120:] == 200).all()  # a rejected crop is only counted
    tiny = np.asarray(qc_regions.overlay(Image.new("RGB", (3, 3)), (512, 512), layer))
    assert tiny.shape == (3, 3, 3)


def test_a_sheet_is_the_same_every_time_and_says_no_name(tiny_slide, tiled, tmp_path):
    """Of a file under another name the sheet has the same pixels, so the name is not in it."""
    first, second = (
        images.read_png(storage.join(tiled, "qc", f"{slide_index.pseudonym('raylarge', name)}.png"))
        for name in ("DOE_JANE.1970.tif", "ROE_RICHARD.tif")
    )
    assert first[0].shape == second[0].shape
    assert (first[0] != second[0]).any()  # their pseudonyms
    assert not [text for text in (*first[1].values(), *second[1].values()) if "OE" in text]
    copy = tmp_path / "DOE_JANE.tif"
    copy.write_bytes(Path(tiny_slide).read_bytes())
    rows = every((800, 660), 64, [0, 1])
    with open_slide(tiny_slide) as a, open_slide(str(copy)) as b:
        sheets = [qc.sheet(slide, rows, 64) for slide in (a, b, b)]
    assert all((one == sheets[0]).all() for one in sheets)


def test_a_sheet_shows_the_splits_that_are_there(tiny_slide, tiled):
    parts = storage.glob(f"{tiled}/tiles/*.parquet")
    found = storage.read_table(parts[0])
    with open_slide(tiny_slide) as slide:
        both = qc.sheet(slide, found, 64)
        alone = qc.sheet(slide, found.filter(pa.compute.equal(found["split"], "train")), 64)
    train, val, test = qc_regions.SPLITS.values()
    assert has(both, train)
    assert has(both, val)
    assert not has(both, test)
    assert has(alone, train)
    assert not has(alone, val)


def test_a_slide_of_which_nothing_is_kept_has_a_sheet(tiny_slide):
    with open_slide(tiny_slide) as slide:
        shown = qc.sheet(slide, table([(0, 0, 0, "train", "tissue 0 < 0.5")]), 64)
    assert has(shown, qc_regions.REASONS["tissue"][1])


@pytest.mark.parametrize(
    ("size", "factors", "patch_px", "scales"),
    [
        ((100_000, 100_000), (1, 4, 16, 64), 256, [0, 3, 7]),
        ((9_000, 8_000), (1,), 256, range(8)),
        ((900, 800), (1,), 256, [0, 24]),
        ((300, 60_000), (1, 4), 256, [0, 1, 2]),
        ((60_000, 300), (1, 4), 256, [0]),
        ((90, 70), (1,), 64, [0, 1]),
        ((1, 1), (1,), 8, [0]),
        ((2_000, 2_000), (1,), 16, range(17)),
    ],
)
def test_sheets_are_small_and_read_little(size, factors, patch_px, scales):
    pyramid = Flat(size, factors)
    shown = qc.sheet(Slide("nowhere", pyramid, 0.5, 0.5), every(size, patch_px, scales), patch_px)
    assert shown.shape[1] == qc.SIDE_PX
    assert shown.shape[0] <= qc.SIDE_PX
    assert pyramid.most <= 40_000_000


def test_examples_are_spread_and_distinct():
    (layer,) = qc_regions.layers(every((640, 640), 64, [0]), 64)
    cells = [tuple(layer.origin_px[i] // 64) for i in qc._spread(layer, (2, 2))]
    assert cells == [(2, 2), (2, 7), (7, 2), (7, 7)]
    few = every((128, 64), 64, [0])
    assert sorted(qc._spread(qc_regions.layers(few, 64)[0], (3, 3))) == [0, 1]


@pytest.mark.parametrize(
    ("name", "mpp"), [("wsi/CMU-1-Small-Region.svs", None), ("wsi/TCGA-CR-7395.svs", 0.25)]
)
def test_a_real_slides_sheet_shows_it(shared_data, tmp_path, name, mpp):
    path = shared_data / name
    tile.run(
        str(tmp_path), [str(path)], TileConfig(256, [0, 1, 2], crops=3, mpp=mpp), ExecutorConfig()
    )
    (png,) = storage.glob(f"{tmp_path}/qc/*.png")
    shown, text = images.read_png(png)
    assert "Synthetic" not in text
    assert max(shown.shape) <= qc.SIDE_PX
    with open_slide(str(path), mpp) as slide:
        thumbnail = slide.thumbnail(16)
        rows, columns = slide.size_px
    wide = int(columns * min(637 / columns, 600 / rows))
    bare = shown[118 : 118 + int(wide * rows / columns), 24 : 24 + wide]
    small = np.asarray(Image.fromarray(bare).resize(thumbnail.shape[1::-1], Image.Resampling.BOX))
    gaps = [np.abs(small.astype(int) - other).mean() for other in (thumbnail, thumbnail[::-1])]
    assert gaps[0] < 10 < 30 < gaps[1]
    assert path.stem not in page_of(str(tmp_path))
