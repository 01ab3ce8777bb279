"""Random exchange files of other tools: every vector at its own tile, or a refusal that says why.

The slide has 5 rows of 7 tiles; a file is laid out from known vectors by cell.
"""

import shutil
import unicodedata

import numpy as np
import pytest
from mutations import Refused, outcome, painted, pick
from PIL import Image

from raylarge import config, tables
from raylarge.data.exchange import h5_embed
from raylarge.data.prepare import Prepare, prepare
from raylarge.report import Report

h5py = pytest.importorskip("h5py")
SIDE, ROWS, COLUMNS, WIDTH = 32, 5, 7, 32
NAME = "Å (1)"


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """A folder where `tile` has run on a slide all of whose tiles are kept."""
    folder = tmp_path_factory.mktemp("h5")
    pixels = painted(np.random.default_rng(41), ROWS * SIDE + 9, COLUMNS * SIDE + 5)
    slide = folder / f"{unicodedata.normalize('NFD', NAME)}.png"
    Image.fromarray(pixels).save(slide)
    tile = {"patch_px": SIDE, "scales": [0], "mask": "all", "mpp": 0.5, "val_fraction": 0.0}
    values = {"slides": str(slide), "out": f"{folder}/data", "verbs": "tile", "tile": tile}
    prepare(config.build(Prepare, values), Report(f"{folder}/data/report.json"))
    return folder / "data"


def truth(rng):
    """A vector per cell."""
    return rng.standard_normal((ROWS, COLUMNS, WIDTH)).astype(np.float16)


def layout(vectors):
    """(x, y) and vectors of all cells, and the attributes of coords."""
    cells = np.argwhere(np.ones(vectors.shape[:2], bool))
    told = {"patch_size": SIDE, "patch_size_level0": SIDE}
    return cells[:, ::-1] * SIDE, vectors.reshape(-1, WIDTH), told


def write(folder, xy, vectors, told, name=NAME, **options):
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        if vectors is not None:
            file.create_dataset("features", data=vectors, **options)
        if xy is not None:
            file.create_dataset("coords", data=xy).attrs.update(told)
    return folder


def imported(root, source, **more):
    """The embedded vectors by cell, after an import."""
    values = {"data": str(root), "source": str(source), "encoder": "toy", **more}
    h5_embed.run(config.build(h5_embed.Import, values))
    rows = tables.rows(str(root), "embeddings").to_pylist()
    return {
        (row["row"], column): np.reshape(row["embedding"], (COLUMNS, WIDTH))[column].tolist()
        for row in rows
        for column in range(COLUMNS)
        if row["valid"][column]
    }


def stated(rng):
    """The attributes in which a tool says how wide a patch is."""
    wrap = pick(rng, [int, float, np.int32, np.float64, lambda v: np.array([v]), lambda v: [v, v]])
    return pick(
        rng,
        [
            {"patch_size": wrap(SIDE), "patch_size_level0": wrap(SIDE)},
            {"patch_size": wrap(16), "patch_size_level0": wrap(SIDE)},
            {"patch_size": wrap(SIDE), "patch_level": wrap(0)},
            {"patch_size": wrap(16), "patch_level": wrap(1), "downsample": wrap(2)},
            {"patch_size": wrap(8), "downsample": np.array([4.0, 4.01])},
            {"patch_size": wrap(16), "downsample": wrap(1), "custom_downsample": wrap(2)},
            {"patch_size_level0": str(SIDE)},
        ],
    )


@pytest.mark.parametrize("seed", range(30))
def test_every_vector_comes_to_its_tile(tiled, tmp_path, seed):
    rng = np.random.default_rng([42, seed])
    vectors = truth(rng)
    xy, rows, _ = layout(vectors)
    told = {**stated(rng), "name": "x", "overlap": 0}
    if rng.random() < 0.3:
        told |= {"level0_width": COLUMNS * SIDE + 5, "level0_height": [ROWS * SIDE + 9]}
    order = rng.permutation(len(xy))
    xy, rows = xy[order], rows[order].astype(pick(rng, [np.float16, np.float32, np.float64]))
    xy = xy.astype(pick(rng, [np.int64, np.int32, np.uint16, np.float32, ">i8"]))
    if rng.random() < 0.2:
        xy = xy + pick(rng, [0.4, -0.4])
    lead = pick(rng, [(slice(None),), (None,)])
    options = pick(rng, [{}, {"compression": "gzip"}, {"chunks": True}])
    form = pick(rng, ["NFC", "NFD"])
    name = pick(rng, [NAME, f"{NAME}_patches", f"{NAME}.png"])
    folder = write(
        tmp_path / "h5", xy[lead], rows[lead], told, unicodedata.normalize(form, name), **options
    )
    shutil.copytree(tiled, tmp_path / "data")
    expected = {cell: vectors[cell].tolist() for cell in np.ndindex(ROWS, COLUMNS)}
    assert outcome(lambda: imported(tmp_path / "data", folder)) == expected


def swapped(rng, xy, rows, told):
    return xy[:, ::-1], rows, told, ["swapped"]


def shifted(rng, xy, rows, told):
    by = pick(rng, [[3, 0], [0, 16], [-5, 5]])
    return xy + by, rows, told, ["patch"]


def one_off(rng, xy, rows, told):
    xy = xy.copy()
    xy[9] += [0, 2]
    return xy, rows, told, [f"x={xy[9, 0]}, y={xy[9, 1]}", "1 of 35"]


def beyond(rng, xy, rows, told):
    far = [[pick(rng, [COLUMNS * SIDE * 9, -SIDE]), 0]]
    return np.concatenate([xy, far]), np.concatenate([rows, rows[:1]]), told, ["1 of its 36"]


def twice(rng, xy, rows, told):
    return (
        np.concatenate([xy, xy[3:4]]),
        np.concatenate([rows, rows[:1]]),
        told,
        ["1 of 36", "twice"],
    )


def lacking(rng, xy, rows, told):
    return xy[2:], rows[2:], told, ["lacks 2 of the 35", "row 0, column 0"]


def wider(rng, xy, rows, told):
    side = pick(rng, [16, 64, 256])
    return xy, rows, {"patch_size_level0": side}, [f"{side} level-0 pixels wide"]


def unsaid(rng, xy, rows, told):
    told = pick(rng, [{}, {"patch_size": SIDE}, {"patch_size": SIDE, "patch_level": 1}])
    return xy, rows, told, ["do not tell patch_size"]


def odd_size(rng, xy, rows, told):
    odd = [0, -32, "wide", np.nan, np.inf, [32, 64], [], h5py.Empty("f")]
    return xy, rows, {"patch_size_level0": pick(rng, odd)}, ["patch_size_level0"]


def other_slide(rng, xy, rows, told):
    return xy, rows, {**told, "level0_width": 169, "level0_height": 229}, ["was made of a slide"]


def wrong_rows(rng, xy, rows, told):
    rows = pick(rng, [rows[:-1], rows[:1], np.concatenate([rows, rows])])
    return xy, rows, told, [f"{len(rows)} rows of features for 35 coords"]


def wrong_width(rng, xy, rows, told):
    rows = np.tile(rows, (1, 2)) if rng.random() < 0.5 else rows[:, :-1]
    return xy, rows, told, [f"{rows.shape[1]} channels"]


def not_finite(rng, xy, rows, told):
    rows = rows.astype(np.float64)
    rows[9, int(rng.integers(WIDTH))] = pick(rng, [np.nan, np.inf, -np.inf, 1e6])
    return xy, rows, told, ["1 of 35", f"x={xy[9, 0]}, y={xy[9, 1]}"]


def odd_shape(rng, xy, rows, told):
    return pick(
        rng,
        [
            (xy, rows[:, :, None], told, ["shape"]),
            (xy, rows.ravel(), told, ["shape"]),
            (xy, rows.T, told, ["rows of features"]),
            (xy.T, rows, told, ["shape"]),
            (xy.ravel(), rows, told, ["shape"]),
            (np.column_stack([xy, xy]), rows, told, ["shape"]),
            (xy, np.stack([rows, rows]), told, ["shape"]),
        ],
    )


def odd_type(rng, xy, rows, told):
    return pick(
        rng,
        [
            (xy, rows.astype(np.int32), told, ["type int32"]),
            (xy, rows.astype(np.complex64), told, ["type complex64"]),
            (xy.astype("S4"), rows, told, ["type"]),
            (xy.astype(np.complex64), rows, told, ["type complex64"]),
            (np.where(xy == 0, np.nan, xy), rows, told, ["coords that no slide has"]),
            (xy.astype(np.float64) * 1e300, rows, told, ["coords that no slide has"]),
        ],
    )


def without(rng, xy, rows, told):
    return pick(
        rng,
        [(None, rows, told, ["holds no 'coords'"]), (xy, None, told, ["no dataset 'features'"])],
    )


def none_at_all(rng, xy, rows, told):
    return xy[:0], rows[:0], told, ["35"]


FAULTS = [
    *(swapped, shifted, one_off, beyond, twice, lacking, wider, unsaid, odd_size, other_slide),
    *(wrong_rows, wrong_width, not_finite, odd_shape, odd_type, without, none_at_all),
]


@pytest.mark.parametrize("seed", range(3 * len(FAULTS)))
def test_a_file_with_one_fault_is_refused_for_it(tiled, tmp_path, seed):
    rng = np.random.default_rng([43, seed])
    fault = FAULTS[seed % len(FAULTS)]
    xy, rows, told, words = fault(rng, *layout(truth(rng)))
    folder = write(tmp_path / "h5", xy, rows, told)
    assert outcome(lambda: imported(tiled, folder, fill=fault is not lacking)) == Refused(*words)
    assert not (tiled / "embed.json").exists()


@pytest.mark.parametrize("seed", range(15))
def test_a_file_that_is_cut_or_garbled_is_refused_or_right(tiled, tmp_path, seed):
    rng = np.random.default_rng([44, seed])
    vectors = truth(rng)
    folder = write(tmp_path / "h5", *layout(vectors), fletcher32=True)
    path = folder / f"{NAME}.h5"
    content = path.read_bytes()
    at = int(rng.integers(1, len(content)))
    path.write_bytes(pick(rng, [content[:at], b"", b"PK" + content, content[:8] + bytes(at)]))
    assert outcome(lambda: imported(tiled, folder)) == Refused("its h5", "damaged or no HDF5")


@pytest.mark.parametrize("names", [(NAME.lower(),), (f"{NAME}2",), ("A (1)",), ("Å",), ()])
def test_a_file_of_another_name_is_not_taken(tiled, tmp_path, names):
    (tmp_path / "h5").mkdir()
    for name in names:
        write(tmp_path / "h5", *layout(truth(np.random.default_rng(45))), name)
    assert outcome(lambda: imported(tiled, tmp_path / "h5")) == Refused("h5")


def test_two_files_of_one_name_are_refused(tiled, tmp_path):
    for form in ("NFC", "NFD"):
        layout_ = layout(truth(np.random.default_rng(46)))
        write(tmp_path / "h5", *layout_, unicodedata.normalize(form, NAME))
    assert outcome(lambda: imported(tiled, tmp_path / "h5")) == Refused("1 names twice")


def test_a_file_of_coords_is_not_taken_for_that_of_a_slide_so_named(tiled, tmp_path):
    vectors = truth(np.random.default_rng(47))
    write(tmp_path / "h5", *layout(vectors), NAME)
    write(tmp_path / "h5", *layout(vectors + 1), f"{NAME}_patches")
    shutil.copytree(tiled, tmp_path / "data")
    expected = {cell: vectors[cell].tolist() for cell in np.ndindex(ROWS, COLUMNS)}
    assert outcome(lambda: imported(tmp_path / "data", tmp_path / "h5")) == expected
