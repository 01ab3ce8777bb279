"""Files that were cut, garbled and mixed up at random: a sentence or pixels, never a traceback."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import tifffile
from PIL import Image

from raylarge.errors import UserError
from raylarge.slides import masks
from raylarge.slides.protocol import ReadOptions
from raylarge.slides.reader import open_slide

OPTIONS = ReadOptions(value_range=(0.0, 1.0))


@pytest.fixture(scope="module")
def image():
    y, x = np.mgrid[0:120, 0:150] / 20.0
    waves = [np.sin(3 * y + x), np.cos(2 * x - y), np.sin(x * y / 4)]
    return (127.5 + 100 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def write_geo(path, image):
    rasterio = pytest.importorskip("rasterio", reason="the extra raylarge[geo] is not installed")
    facts = {"height": image.shape[0], "width": image.shape[1], "count": 4, "dtype": "uint8"}
    place = rasterio.Affine(1, 0.2, 557_699, 0.2, -1, 3_648_377)
    options = {"crs": "EPSG:26911", "transform": place, "compress": "deflate", **facts}
    with rasterio.open(
        path, "w", driver="GTiff", photometric="rgb", alpha="yes", **options
    ) as file:
        file.write(np.moveaxis(np.dstack([image, np.full_like(image[..., 0], 255)]), -1, 0))


def write(path, image):
    name, tiles = path.name, {"tile": (64, 64), "photometric": "rgb"}
    if name == "deep.tif":
        tifffile.imwrite(path, image.astype(np.uint16) * 257, **tiles, compression="lzw")
    elif name == "float.tif":
        tifffile.imwrite(
            path, image.astype(np.float32) / 255, **tiles, predictor=True, compression=8
        )
    elif name == "planar.tif":
        tifffile.imwrite(
            path, np.moveaxis(image, -1, 0), photometric="rgb", planarconfig="separate"
        )
    elif name == "scenes.ome.tif":
        with tifffile.TiffWriter(path) as writer:
            for pixels in (image, image[:100]):
                writer.write(pixels, **tiles, metadata={"axes": "YXS"})
    elif name == "palette.png":
        Image.fromarray(image).convert("P").save(path, transparency=3)
    elif name == "deep.png":
        Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(path)
    elif name == "map.tif":
        write_geo(path, image)
    else:
        Image.fromarray(image).save(path)


def mutated(content, rng):
    """One of: cut, single bytes changed, a block zeroed, two blocks swapped, bytes left out."""
    data, kind = bytearray(content), rng.integers(5)
    near = len(data) if rng.random() < 0.5 else min(400, len(data))  # half of them in the header
    at, to = sorted(rng.integers(0, near, 2).tolist())
    if kind == 0:
        del data[max(1, at) :]
    elif kind == 1:
        for place in rng.integers(0, near, rng.integers(1, 6)):
            data[place] = rng.integers(256)
    elif kind == 2:
        data[at : to + 1] = bytes(to + 1 - at)
    elif kind == 3:
        size = min(16, len(data) - to)
        data[at : at + size], data[to : to + size] = data[to : to + size], data[at : at + size]
    else:
        del data[at : at + int(rng.integers(1, 9))]
    return bytes(data)


@contextmanager
def outcome():
    """Takes a refusal, which must be one sentence."""
    sentences = []
    try:
        yield sentences
    except UserError as error:
        sentences.append(str(error))
    assert all("\n" not in one and one.endswith(".") for one in sentences)


NAMES = ("deep.tif", "float.tif", "planar.tif", "scenes.ome.tif", "map.tif")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*NAMES, "palette.png", "deep.png", "plain.jpg"])
def test_a_garbled_slide_is_a_sentence_or_pixels(tmp_path, image, name, monkeypatch):
    monkeypatch.setenv("RAYLARGE_CACHE", str(tmp_path / "cache"))
    write(tmp_path / name, image)
    content = (tmp_path / name).read_bytes()
    base_mpp = 1e6 if name == "map.tif" else 0.5
    options = OPTIONS if name == "float.tif" else ReadOptions()
    refused = 0
    for seed in range(40):
        path = tmp_path / f"{seed}-{name}"
        path.write_bytes(mutated(content, np.random.default_rng([seed, len(name)])))
        override = None if name == "map.tif" else 0.5
        with (
            outcome() as sentences,
            open_slide(str(path), override, base_mpp, options=options) as one,
        ):
            rows, columns = (min(300, side) for side in one.size_px)
            region = one.read(0, 0, rows, columns)
            assert (region.shape, region.dtype) == ((rows, columns, 3), np.uint8)
        refused += len(sentences)
    assert refused >= 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mask.png", "mask.tif", "mask.geojson"])
def test_a_garbled_mask_is_a_sentence_or_a_mask(tmp_path, image, name):
    ring = [[0.5, 0.5], [140.0, 3.0], [90.0, 110.0], [0.5, 0.5]]
    if name == "mask.geojson":
        line = {"type": "LineString", "coordinates": ring[:2]}
        shapes = [{"type": "Polygon", "coordinates": [ring]}, line]
        text = [{"type": "Feature", "geometry": one, "properties": {}} for one in shapes]
        (tmp_path / name).write_text(json.dumps(text))
    else:
        Image.fromarray((image[..., 0] > 128).astype(np.uint8)).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    refused = 0
    for seed in range(60):
        path = tmp_path / f"{seed}-{name}"
        path.write_bytes(mutated(content, np.random.default_rng([seed, len(name)])))
        with outcome() as sentences:
            mask = masks.read(str(path), (120, 150), (12, 15))
            assert (mask.shape, mask.dtype) == ((12, 15), np.bool_)
        refused += len(sentences)
    assert refused >= 5
