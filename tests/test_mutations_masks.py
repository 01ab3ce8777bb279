"""Random mask images and GeoJSON of known cells: exactly those, or a refusal that says why."""

import json

import numpy as np
import pytest
import tifffile
from mutations import Refused, cells, outcome, pick
from PIL import Image

from raylarge.slides import masks

NUMBER_TYPES = [
    *(np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64),
    *(np.float16, np.float32, np.float64),
]


def lit_levels(rng, mask, kind):
    """Random values, above 0 where the mask is lit."""
    if not np.issubdtype(kind, np.integer):
        return np.where(mask, rng.uniform(1e-6, 1, mask.shape), 0).astype(kind)
    levels = rng.integers(1, np.iinfo(kind).max, mask.shape, kind, endpoint=True)
    return np.where(mask, levels, kind(0))


def save_grey(rng, mask, path):
    """8-bit grey of any level above 0."""
    Image.fromarray(lit_levels(rng, mask, np.uint8)).save(path.with_suffix(".png"))


def save_bits(rng, mask, path):
    """1 bit, in PNG, TIFF with Group 4, BMP or PBM."""
    ending, options = pick(
        rng, [(".png", {}), (".tif", {"compression": "group4"}), (".bmp", {}), (".pbm", {})]
    )
    Image.fromarray(mask).save(path.with_suffix(ending), **options)


def save_labels(rng, mask, path):
    """Labels of 16 bits, whose lower byte may be 0."""
    values = np.where(mask, rng.choice([1, 256, 512, 65280, 65535], mask.shape), 0)
    Image.fromarray(values.astype(np.uint16)).save(path.with_suffix(".png"))


def save_colours(rng, mask, path):
    """RGB in which one channel alone is lit."""
    rgb = np.zeros((*mask.shape, 3), np.uint8)
    rgb[..., int(rng.integers(3))] = lit_levels(rng, mask, np.uint8)
    Image.fromarray(rgb).save(path.with_suffix(pick(rng, [".png", ".tif", ".bmp", ".ppm"])))


def save_alpha(rng, mask, path):
    """White everywhere, transparent where there is no tissue."""
    rgba = np.full((*mask.shape, 4), 255, np.uint8)
    rgba[..., 3] = lit_levels(rng, mask, np.uint8)
    picture = Image.fromarray(rgba)
    picture = pick(rng, [picture, picture.convert("LA")])
    picture.save(path.with_suffix(".png"))


def save_palette(rng, mask, path):
    """A palette in which 0 is a colour and another index is black."""
    black = int(rng.integers(1, 6))
    palette = rng.integers(1, 256, (6, 3), dtype=np.uint8)
    palette[black] = 0
    others = [i for i in range(6) if i != black]
    picture = Image.fromarray(
        np.where(mask, rng.choice(others, mask.shape), black).astype(np.uint8)
    )
    picture.putpalette(palette.ravel().tolist())
    picture.save(path.with_suffix(pick(rng, [".png", ".gif", ".bmp"])))


def save_jpeg(rng, mask, path):
    """Pure black and white survive JPEG where blocks of 8 pixels are of one colour."""
    Image.fromarray((mask * 255).astype(np.uint8)).save(path.with_suffix(".jpg"), quality=100)


def save_tiff(rng, mask, path):
    """TIFF of any type and compression, in strips, tiles or planes."""
    kind = pick(rng, [np.bool_, *NUMBER_TYPES])
    values = mask if kind is np.bool_ else lit_levels(rng, mask, kind)
    if kind in (np.int16, np.int32, np.int64) and rng.random() < 0.5:
        values = np.where(mask, values, -1).astype(kind)
    options = pick(rng, [{}, {"tile": (16, 16)}, {"rowsperstrip": 3}, {"byteorder": ">"}])
    codec = None if kind is np.bool_ else pick(rng, [None, "zlib", "lzw", "packbits"])
    tifffile.imwrite(path.with_suffix(".tif"), values, compression=codec, **options)


def save_deep_colours(rng, mask, path):
    """RGB of 16 bits, of faint levels, with or without alpha, in planes or not."""
    separate = rng.random() < 0.5
    rgb = np.zeros((*mask.shape, 3), np.uint16)
    rgb[..., int(rng.integers(3))] = np.where(mask, int(rng.integers(1, 300)), 0)
    options = {"extrasamples": ["unassalpha"]} if rng.random() < 0.5 else {}
    if options:
        rgb = np.dstack([np.full_like(rgb, 7), rgb.max(axis=-1)])
    rgb = np.moveaxis(rgb, -1, 0) if separate else rgb
    planes = "separate" if separate else "contig"
    tifffile.imwrite(
        path.with_suffix(".tif"), rgb, photometric="rgb", planarconfig=planes, **options
    )


def save_sparse(rng, mask, path):
    """Tiles without any tissue are left out of the file."""
    values = lit_levels(rng, mask, pick(rng, NUMBER_TYPES))

    def tiles():
        for top in range(0, mask.shape[0], 16):
            for left in range(0, mask.shape[1], 16):
                tile = values[top : top + 16, left : left + 16]
                page = np.zeros((16, 16), values.dtype)
                page[: tile.shape[0], : tile.shape[1]] = tile
                yield page if tile.any() else None

    tifffile.imwrite(
        path.with_suffix(".tif"), tiles(), shape=mask.shape, dtype=values.dtype, tile=(16, 16)
    )


KINDS = (
    *(save_grey, save_bits, save_labels, save_colours, save_alpha, save_palette),
    *(save_jpeg, save_tiff, save_tiff, save_tiff, save_deep_colours, save_sparse),
)


def read(path, size_l0, shape):
    (found,) = path.parent.glob(f"{path.name}.*")
    return masks.read(str(found), size_l0, shape).tolist()


@pytest.mark.parametrize("seed", range(72))
def test_a_mask_image_lights_its_own_cells(tmp_path, seed):
    rng = np.random.default_rng([21, seed])
    shape = tuple(int(n) for n in rng.integers(3, 12, 2))
    mask = cells(rng, *shape)
    save = KINDS[seed % len(KINDS)]
    side = 8 if save is save_jpeg else int(rng.integers(1, 7))  # pixels of the mask per cell
    save(rng, mask.repeat(side, axis=0).repeat(side, axis=1), tmp_path / "m")
    scale = int(rng.integers(1, 300))  # level-0 pixels per cell
    size_l0 = (shape[0] * scale, shape[1] * scale)
    assert outcome(lambda: read(tmp_path / "m", size_l0, shape)) == mask.tolist()


def transposed(rng, mask, path):
    shape = mask.shape
    save_grey(rng, mask[:, : max(2, shape[0] // 2)].T, path)
    return Refused("rows x", "columns")


def cropped(rng, mask, path):
    save_grey(rng, mask[: len(mask) - 4 - len(mask) // 8], path)
    return Refused("not of one shape")


def cut(rng, mask, path):
    save_grey(rng, mask, path)
    content = path.with_suffix(".png").read_bytes()
    path.with_suffix(".png").write_bytes(content[: int(rng.integers(1, len(content) - 20))])
    return Refused("mask")


def empty(rng, mask, path):
    path.with_suffix(".png").write_bytes(b"")
    return Refused("is not an image that can be read")


def text(rng, mask, path):
    path.with_suffix(".png").write_text(pick(rng, ["<html>", "\x00" * 50, "P6 1 1 255", "GIF89a"]))
    return Refused("mask")


def black(rng, mask, path):
    """Fits, and lights nothing."""
    save_grey(rng, mask & False, path)
    return (mask & False).tolist()


@pytest.mark.parametrize("seed", range(24))
def test_a_mask_image_that_does_not_fit_is_refused(tmp_path, seed):
    rng = np.random.default_rng([22, seed])
    shape = (int(rng.integers(20, 30)), int(rng.integers(20, 40)))
    fault = (transposed, cropped, cut, empty, text, black)[seed % 6]
    expected = fault(rng, cells(rng, *shape), tmp_path / "m")
    assert outcome(lambda: read(tmp_path / "m", (shape[0] * 9, shape[1] * 9), shape)) == expected


def ring(top, bottom, left, right, cell, rng):
    """The ring of a box of cells, a pixel inside it, either way round, from any corner."""
    y0, y1, x0, x1 = (top * cell + 1, bottom * cell - 1, left * cell + 1, right * cell - 1)
    places = [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]
    places = places[:: pick(rng, [1, -1])]
    turn = int(rng.integers(4))
    places = [[*one] for one in places[turn:] + places[:turn]]
    if rng.random() < 0.3:
        places = [[*one, 7.5] for one in places]
    if rng.random() < 0.3:
        places = [[one[0] + 0.25, one[1] - 0.25, *one[2:]] for one in places]
    return [*places, places[0]]


def boxes(rng, shape):
    """Some boxes of cells, each in a quarter of its own: top, bottom, left, right."""
    rows, columns = (side // 2 for side in shape)
    for i in rng.permutation(4)[: int(rng.integers(1, 5))].tolist():
        top, left = (i // 2) * rows, (i % 2) * columns
        height, width = int(rng.integers(3, rows)), int(rng.integers(3, columns))
        yield top, top + height, left, left + width


def wrapped(rng, polygons):
    """A GeoJSON document of polygons, in one of the ways in which tools write it."""
    kinds = [
        *([{"type": "Polygon", "coordinates": one} for one in polygons],) * 2,
        [{"type": "MultiPolygon", "coordinates": polygons}],
    ]
    shapes = pick(rng, kinds)
    if rng.random() < 0.3:
        shapes = [{"type": "GeometryCollection", "geometries": shapes}]
    if rng.random() < 0.3:
        shapes.append({"type": pick(rng, ["Point", "MultiPoint"]), "coordinates": [[1, 2]]})
        shapes.append({"type": "LineString", "coordinates": [[0, 0], [50, 50]]})
    features = [{"type": "Feature", "id": "é", "properties": None, "geometry": s} for s in shapes]
    if rng.random() < 0.3:
        features.append({"type": "Feature", "properties": {}, "geometry": None})
    collection = {"type": "FeatureCollection", "features": features, "bbox": [0, 0, 1, 1]}
    return pick(rng, [collection, features, collection])


def drawn(tmp_path, document, size_l0, shape):
    path = tmp_path / "m.geojson"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return masks.read(str(path), size_l0, shape).tolist()


@pytest.mark.parametrize("seed", range(40))
def test_contours_light_their_own_cells(tmp_path, seed):
    rng = np.random.default_rng([23, seed])
    shape, cell = tuple(int(n) for n in rng.integers(10, 30, 2)), int(rng.integers(8, 60))
    expected, polygons = np.zeros(shape, bool), []
    for top, bottom, left, right in boxes(rng, shape):
        rings = [ring(top, bottom, left, right, cell, rng)]
        expected[top:bottom, left:right] = True
        polygons.append(rings)
    document = wrapped(rng, polygons)
    size_l0 = (shape[0] * cell, shape[1] * cell)
    assert outcome(lambda: drawn(tmp_path, document, size_l0, shape)) == expected.tolist()


FAULTY = [
    (lambda p: p.pop(), "places that bound no area"),
    (lambda p: p.__setitem__(1, [float("nan"), 3]), "no number of pixels"),
    (lambda p: p.__setitem__(1, [float("inf"), 3]), "no number of pixels"),
    (lambda p: p.__setitem__(1, ["7", 3]), "no number of pixels"),
    (lambda p: p.__setitem__(1, [True, 3]), "no number of pixels"),
    (lambda p: p.__setitem__(1, [None, 3]), "no number of pixels"),
    (lambda p: p.__setitem__(1, [[1, 2], [3, 4]]), "no number of pixels"),
    (lambda p: p.__setitem__(1, [5]), "no [x, y]"),
    (lambda p: p.__setitem__(1, None), "no [x, y]"),
    (lambda p: p.__setitem__(1, {"x": 1, "y": 2}), "no [x, y]"),
    (lambda p: p.__setitem__(1, [10**400, 2]), "no number of pixels"),
    (lambda p: [one.__setitem__(0, one[0] + 10**6) for one in p], "off the slide"),
    (lambda p: [one.__setitem__(1, -one[1] - 1) for one in p], "off the slide"),
]


@pytest.mark.parametrize("fault", range(len(FAULTY)))
def test_a_contour_with_one_fault_is_refused_for_it(tmp_path, fault):
    rng = np.random.default_rng([24, fault])
    change, words = FAULTY[fault]
    places = [[30, 40], [90, 40], [60, 120], [30, 40]]
    if fault == 0:
        places = places[1:]
    change(places)
    document = wrapped(rng, [[places]])
    assert outcome(lambda: drawn(tmp_path, document, (300, 200), (30, 20))) == Refused(words)


BROKEN = [
    *("", "{", "null", "7", '"text"', "[7]", "NaN", '{"type": "FeatureCollection"}'),
    '{"type": "Polygon", "coordinates": null}',
    '{"type": "Polygon", "coordinates": {}}',
    '{"type": "Polygon", "coordinates": [[]]}',
    '{"type": "Polygon", "coordinates": "abc"}',
    '{"type": "polygon", "coordinates": [[[1, 1], [9, 1], [9, 9], [1, 1]]]}',
    '{"type": ["Polygon"], "coordinates": [[[1, 1], [9, 1], [9, 9], [1, 1]]]}',
    '{"type": "Circle", "coordinates": [5, 5], "radius": 3}',
    '{"type": "Topology", "objects": {}}',
    '{"type": "Feature", "geometry": {"type": "Feature"}}',
    "[" * 100_000,
    '{"type": "GeometryCollection", "geometries": [' * 3000,
    '{"type": "Feature", "features": []}',
]


@pytest.mark.parametrize("broken", range(len(BROKEN)))
def test_what_is_no_contour_is_refused_or_lights_nothing(tmp_path, broken):
    expected = Refused("is no GeoJSON of polygons")
    if BROKEN[broken] == "null":
        expected = np.zeros((30, 20), bool).tolist()
    assert outcome(lambda: drawn(tmp_path, BROKEN[broken], (300, 200), (30, 20))) == expected
