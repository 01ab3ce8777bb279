import io
import json
import os
import time

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

from raylarge.errors import SlideError
from raylarge.slides import mask_images, masks

SIZE = (800, 1000)


def square(left, top, side):
    """A closed ring in level-0 pixels; its edges lie inside cells of 10 pixels."""
    low, high = (left + 1, top + 1), (left + side - 1, top + side - 1)
    return [list(low), [high[0], low[1]], list(high), [low[0], high[1]], list(low)]


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


def features(*geometries):
    return {
        "type": "FeatureCollection",
        "features": [{"type": "Feature", "geometry": one} for one in geometries],
    }


@pytest.fixture
def drawn(tmp_path):
    """Reads contours as a mask of 80 x 100 cells."""

    def read(node, shape=(80, 100)):
        (tmp_path / "a.geojson").write_text(json.dumps(node))
        return masks.read(str(tmp_path / "a.geojson"), SIZE, shape)

    return read


@pytest.fixture
def shown(tmp_path):
    """Reads an image as a mask."""

    def read(picture, shape, name="mask.png"):
        picture.save(tmp_path / name)
        size_l0 = (10 * picture.height, 10 * picture.width)
        return masks.read(str(tmp_path / name), size_l0, shape)

    return read


def cells(*boxes):
    """Cells of [top, bottom) x [left, right), the later ones off where they say so."""
    page = np.zeros((80, 100), bool)
    for top, bottom, left, right, ink in boxes:
        page[top:bottom, left:right] = ink
    return page


def test_polygons_are_in_level_0_pixels_x_first(drawn):
    mask = drawn(features(polygon(square(100, 200, 300))))
    assert (mask == cells((20, 50, 10, 40, True))).all()
    assert drawn({"type": "FeatureCollection", "features": []}).sum() == 0


def test_they_are_scaled_to_what_is_wanted(drawn):
    coarse, fine = (drawn(polygon(square(100, 200, 300)), s) for s in ((40, 50), (800, 1000)))
    assert coarse[10:25, 5:20].all()
    assert coarse.sum() == 15 * 15
    assert abs(fine.sum() - 298 * 298) < 3 * 298


def test_a_hole_is_no_tissue_and_what_lies_in_it_is(drawn):
    ring = polygon(square(100, 100, 600), square(200, 200, 400))
    island = polygon(square(300, 300, 100))
    expected = drawn(features(ring)) | drawn(features(island))
    assert expected[10:70, 10:70].mean() < 1
    assert not expected[21:29, 21:29].any()
    for order in ([ring, island], [island, ring]):
        mask = drawn(features(*order))
        assert mask[30:40, 30:40].all()
        assert (mask == expected).all()


def test_every_kind_of_areas_is_read(drawn):
    a, b = square(100, 100, 200), square(500, 400, 200)
    expected = cells((10, 30, 10, 30, True), (40, 60, 50, 70, True))
    several = {"type": "MultiPolygon", "coordinates": [[a], [b]]}
    mixed = {"type": "GeometryCollection", "geometries": [polygon(a), polygon(b)]}
    feature = {"type": "Feature", "geometry": several}
    with_none = features(several, None)  # a feature without a place
    for node in (several, mixed, feature, [polygon(a), polygon(b)], with_none):
        assert (drawn(node) == expected).all()


def test_heights_count_for_nothing(drawn):
    flat = square(100, 100, 200)
    assert (drawn(polygon([[*one, 7.5] for one in flat])) == drawn(polygon(flat))).all()


def test_what_lies_over_the_edge_is_cut_off(drawn):
    assert (drawn(polygon(square(-100, 700, 300))) == cells((70, 80, 0, 20, True))).all()


def test_polygons_alone_are_drawn_as_on_the_whole_page(drawn):
    rng = np.random.default_rng(0)
    corners = [rng.uniform(-100, 1100, (5, 2)) for _ in range(40)]
    page = Image.new("1", (100, 80))
    for ring in corners:
        ImageDraw.Draw(page).polygon((ring / 10).ravel().tolist(), fill=1)
    assert (drawn(features(*(polygon(ring.tolist()) for ring in corners))) == page).all()


def test_thousands_of_polygons_take_no_time(drawn):
    nuclei = [polygon(square(x, y, 12)) for x in range(0, 1000, 10) for y in range(0, 800, 10)]
    started = time.monotonic()
    assert drawn(features(*nuclei), (800, 1000)).mean() > 0.9
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1, 2]",
        "7",
        "\xff",
        '{"type": "Polygon"}',
        '{"type": "Point", "coordinates": [1, 2]}',
        '{"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}',
        '{"type": "Polygon", "coordinates": [[["a", 2], [3, 4], [5, 6]]]}',
        '{"type": "Polygon", "coordinates": [[[NaN, 2], [3, 4], [5, 6]]]}',
        '{"type": "Polygon", "coordinates": [[1, 2, 3]]}',
    ],
)
def test_another_json_is_one_sentence(tmp_path, text):
    (tmp_path / "a.geojson").write_text(text, encoding="latin-1")
    with pytest.raises(
        SlideError, match=r"^mask \S+a\.geojson: the file is no GeoJSON of polygons [^\n]+$"
    ):
        masks.read(str(tmp_path / "a.geojson"), SIZE, (8, 10))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("NaN", "a coordinate that is no number of pixels: nan"),
        ("Infinity", "no number of pixels: inf"),
        ("1e300", "no number of pixels: 1e[+]300"),
        ('"12"', "no number of pixels: 12"),
        ("true", "no number of pixels: True"),
    ],
)
def test_a_coordinate_that_is_no_number_is_one_sentence(tmp_path, place, reason):
    rest = "2], [300, 4], [50, 600]]]}"
    text = f'{{"type": "Polygon", "coordinates": [[[{place}, {rest}'
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(SlideError, match=reason):
        masks.read(str(tmp_path / "a.geojson"), SIZE, (80, 100))


def test_points_and_lines_are_left_out_and_counted(tmp_path, drawn):
    box = polygon(square(100, 200, 300))
    points = [{"type": "Point", "coordinates": [30, 40]}] * 2
    line = {"type": "LineString", "coordinates": [[0, 0], [9, 9]]}
    bare = [{"type": "Feature", "geometry": one} for one in (*points, box, line)]
    notes = []
    (tmp_path / "bare.geojson").write_text(json.dumps(bare))
    mask = masks.read(str(tmp_path / "bare.geojson"), SIZE, (80, 100), notes)
    assert (mask == drawn(box)).all()
    assert notes == ["shapes of the mask without area were left out: 1 LineString, 2 Point"]
    with pytest.raises(SlideError, match="shapes without area alone: 2 Point"):
        drawn(features(*points))


def test_an_empty_mask_an_open_ring_and_one_off_the_slide_are_said(tmp_path):
    def notes_of(node):
        notes = []
        (tmp_path / "a.geojson").write_text(json.dumps(node))
        masks.read(str(tmp_path / "a.geojson"), SIZE, (80, 100), notes)
        return notes

    inside, outside = square(100, 100, 200), square(5000, 100, 300)
    assert notes_of(features()) == ["the mask shows no tissue at all"]
    assert notes_of(polygon(inside[:-1])) == [
        "1 rings of the mask are not closed: their ends were joined"
    ]
    assert notes_of(features(polygon(inside), polygon(outside))) == [
        "1 of the mask's 2 polygons lie off the slide"
    ]


@pytest.mark.parametrize(
    ("ring", "words"),
    [
        ([[-76.5, 38.9], [-76.4, 38.9], [-76.4, 39.0]], "off the slide .* look like degrees"),
        ([[9.5, 48.9], [9.51, 48.9], [9.51, 48.95]], "in a speck of the slide .* like degrees"),
        ([[4e5, 43e5], [4.1e5, 43e5], [4e5, 43.1e5]], "off the slide .*x 400000 to 410000"),
        (square(5000, 100, 300), "off the slide .* and the slide is 2000 x 1600"),
    ],
)
def test_polygons_of_another_place_are_refused(tmp_path, ring, words):
    (tmp_path / "a.geojson").write_text(json.dumps(features(polygon(ring))))
    with pytest.raises(SlideError, match=rf"has all of its 1 polygons {words}.*level-0 pixels"):
        masks.read(str(tmp_path / "a.geojson"), (1600, 2000), (80, 100))


def test_a_mask_of_another_shape_is_refused(shown, tmp_path):
    Image.new("L", (80, 100), 255).save(tmp_path / "turned.png")
    with pytest.raises(
        SlideError, match=r"is 100 rows x 80 columns, and its slide 800 x 1000: .* transposed"
    ):
        masks.read(str(tmp_path / "turned.png"), SIZE, (80, 100))
    for size in ((99, 79), (101, 80), (333, 266)):  # rounding
        Image.new("L", size, 255).save(tmp_path / "near.png")
        assert masks.read(str(tmp_path / "near.png"), SIZE, (80, 100)).all()


def test_a_large_mask_is_read_without_a_word(tmp_path, recwarn):
    mask = np.zeros((9400, 9600), bool)  # Pillow warns at 89 Mpx
    mask[:4700] = True
    Image.fromarray(mask).save(tmp_path / "large.png")
    read = masks.read(str(tmp_path / "large.png"), (9400, 9600), (10, 10))
    assert (read == (np.arange(10) < 5)[:, None]).all()
    assert not [one for one in recwarn if "bomb" in str(one.message).lower()]


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.uint16, np.int32, np.float32])
def test_a_large_tiff_mask_is_read_tile_by_tile(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(mask_images, "WHOLE_PX", 1000)
    lit = np.random.default_rng(0).random((160, 200)) > 0.5
    labels = lit.astype(kind) * kind(0.01 if kind is np.float32 else 1)
    options = {"tile": (64, 64), "compression": "zlib", "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "large.tif", labels, **options)
    assert (masks.read(str(tmp_path / "large.tif"), SIZE, (160, 200)) == lit).all()


def test_the_limit_of_a_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mask_images, "DECODE_PX", 5000)
    Image.new("L", (100, 80), 255).save(tmp_path / "large.png")
    with pytest.raises(SlideError, match=r"claims 80 x 100 pixels, .*convert it to a tiled TIFF"):
        masks.read(str(tmp_path / "large.png"), SIZE, (80, 100))


def test_strips_do_not_change_a_mask(shown, monkeypatch):
    picture = Image.fromarray(np.random.default_rng(3).random((320, 400)) > 0.5)
    whole = [shown(picture, shape) for shape in ((80, 100), (640, 800), (77, 93))]
    monkeypatch.setattr(mask_images, "_STRIP_PX", 1)
    for one, most in zip(whole, (0, 0, 0.01), strict=True):  # a pixel's middle may lie on an edge
        assert (shown(picture, one.shape) != one).mean() <= most


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_every_pixel_that_is_not_black_is_tissue(shown, ending):
    labels = np.zeros((80, 100), np.uint8)
    labels[10:20, 30:50], labels[40:60, 30:50] = 1, 255
    mask = shown(Image.fromarray(labels), (80, 100), f"mask.{ending}")
    assert (mask == (labels > 0)).all()


def test_labels_count_before_the_mask_is_shrunk(shown):
    labels = np.zeros((80, 100), np.uint8)
    labels[10:20, 30:50], labels[40:60, 30:50] = 1, 255
    assert (shown(Image.fromarray(labels), (8, 10)) == (labels > 0)[::10, ::10]).all()


@pytest.mark.parametrize("value", [1, 255])
def test_a_cell_is_tissue_where_half_of_it_is(shown, value):
    page = np.zeros((28, 40), np.uint8)
    flat = page.reshape(4, 7, 4, 10).swapaxes(1, 2)  # 4 x 4 cells of 7 x 10 pixels
    rng = np.random.default_rng(0)
    expected = np.zeros((4, 4), bool)
    for number, cell in enumerate(np.ndindex(4, 4)):
        count = (34, 35, 36, 0)[number % 4]
        expected[cell] = count >= 35
        inside = np.zeros(70, np.uint8)
        inside[rng.permutation(70)[:count]] = value
        flat[cell] = inside.reshape(7, 10)
    assert (shown(Image.fromarray(page), (4, 4)) == expected).all()


def test_a_coarser_mask_is_enlarged(shown):
    small = np.random.default_rng(0).random((8, 10)) > 0.5
    mask = shown(Image.fromarray(small), (80, 100))
    assert (mask == small.repeat(10, 0).repeat(10, 1)).all()


def test_faint_colours_large_labels_and_palettes_are_not_black(shown):
    lit = np.random.default_rng(0).random((8, 10)) > 0.5
    blue = np.zeros((8, 10, 3), np.uint8)
    blue[..., 2] = lit
    deep = Image.fromarray(lit.astype(np.uint16))
    palette = Image.fromarray(lit.astype(np.uint8))
    palette.putpalette([0, 0, 0, 9, 0, 0])
    clear = Image.fromarray(np.dstack([blue * 0 + 255, 255 * lit]).astype(np.uint8))
    for picture in (Image.fromarray(blue), deep, palette, clear):
        assert (shown(picture, (8, 10)) == lit).all()


def test_what_is_no_image_is_one_sentence(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (80, 100), np.uint8)).save(
        buffer, "png"
    )
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:800])
    reasons = {
        "text": "is not an image",
        "empty": "is not an image",
        "cut": "is damaged or incomplete",
    }
    for name, reason in reasons.items():
        with pytest.raises(SlideError, match=rf"^mask \S+{name}\.png: the file {reason}[^\n]+\.$"):
            masks.read(str(tmp_path / f"{name}.png"), SIZE, (8, 10))


@pytest.mark.parametrize("name", ["nowhere.png", "nowhere.geojson"])
def test_a_missing_mask_is_its_slides_fault(tmp_path, name):
    with pytest.raises(
        SlideError, match=rf"^mask \S+{name}: the file does not exist; check the path\.$"
    ):
        masks.read(os.path.join(tmp_path, name), SIZE, (8, 10))
