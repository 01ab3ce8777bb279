"""CLAM's and TRIDENT's files: written in their layout, read from files laid out by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from raylarge import config, storage, tables
from raylarge.data.exchange import h5, h5_embed
from raylarge.data.prepare import Prepare, prepare
from raylarge.errors import UserError
from raylarge.models import ssl
from raylarge.report import Report
from raylarge.slides.reader import open_slide

h5py = pytest.importorskip("h5py")
SIDE = 64
TOLD = {"patch_size": SIDE, "patch_size_level0": SIDE, "overlap": 0, "name": "tiny"}
TOLD |= {
    "level0_magnification": 20,
    "target_magnification": 20,
    "savetodir": "20x_64px_0px_overlap",
}
TOLD |= {"level0_width": 660, "level0_height": 800}


def prepared(root, slide, verbs="tile,embed", **tile):
    small = {"patch_px": SIDE, "scales": [0, 1], "tissue": [0.3, 0.2], "block_tiles": 30, **tile}
    values = {"slides": slide, "out": str(root), "verbs": verbs, "tile": small}
    layers = {"embed": {"encoder": "toy", "batch": 8}}
    return prepare(config.build(Prepare, values, layers), Report(f"{root}/report.json"))


@pytest.fixture(scope="module")
def data(tiny_slide, tmp_path_factory):
    """A folder with the tiny slide's tiles, embeddings and examples: 12 rows of 10 tiles."""
    root = tmp_path_factory.mktemp("h5") / "data"
    prepared(root, tiny_slide, "tile,embed,shard")
    return str(root)


@pytest.fixture
def tiled(tiny_slide, tmp_path):
    """A folder where only `tile` has run."""
    prepared(tmp_path / "tiled", tiny_slide, "tile")
    return str(tmp_path / "tiled")


@pytest.fixture
def trident(data, tmp_path):
    """The embeddings of `data` as TRIDENT would have written them for the slide's own name."""
    cells, vectors = embedded(data)
    path = tmp_path / "trident" / "features_toy" / "tiny.h5"
    write(path, [(c * SIDE, r * SIDE) for r, c in cells], vectors)
    return path


def embedded(root):
    """(row, column) of the valid cells, and their vectors."""
    cells, vectors = [], []
    for row in tables.rows(root, "embeddings").to_pylist():
        values = np.array(row["embedding"], np.float16).reshape(row["columns"], -1)
        cells += [(row["row"], c) for c in np.flatnonzero(row["valid"])]
        vectors += list(values[row["valid"]])
    return cells, np.stack(vectors)


def write(path, xy, vectors, told=TOLD):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if vectors is not None:
            file.create_dataset("features", data=vectors.astype(np.float32))
        file.create_dataset("coords", data=np.array(xy, np.int64)).attrs.update(told)


def exported(root, out, **more):
    return h5.run(config.build(h5.Export, {"data": root, "out": str(out)}, more))


def imported(root, source, **more):
    layers = {"data": root, "source": str(source), "encoder": "toy", "embed": {"batch": 8}}
    return h5_embed.run(config.build(h5_embed.Import, layers, more))


def name_of(root):
    return storage.read_json(f"{root}/slides.json")["slides"][0]["slide_id"]


def seen(slide, x, y):
    """What the toy encoder makes of the base tile at level-0 (x, y) of a 20x slide."""
    tile = slide.read(int(y), int(x), SIDE, SIDE)
    return ssl.load("toy")(np.stack([tile] * 8))[0]


def test_trident_finds_its_layout(data, tmp_path, tiny_slide):
    done = exported(data, tmp_path)
    name, folder = name_of(data), tmp_path / "20x_64px_0px_overlap"
    cells, vectors = embedded(data)
    assert (done["slides"], done["cells"]) == (1, len(cells))
    with h5py.File(folder / "patches" / f"{name}_patches.h5") as file:
        coords = file["coords"]
        assert (coords.dtype, coords.shape) == (np.int64, (len(cells), 2))
        told = dict(coords.attrs)
        assert {key: told[key] for key in TOLD} == {**TOLD, "name": name}
        assert (
            coords[:].max(axis=0).tolist()
            == [SIDE * max(c) for c in zip(*cells, strict=True)][::-1]
        )
    with h5py.File(folder / "features_toy" / f"{name}.h5") as file:
        xy, features = file["coords"][:], file["features"][:]
        assert features.dtype == np.float32
        assert dict(file["coords"].attrs)["patch_size_level0"] == SIDE
    assert (features == vectors).all()
    with open_slide(tiny_slide) as slide:  # the pixels say which of x and y is which
        for i in (0, len(xy) // 3, len(xy) - 1):
            assert (seen(slide, *xy[i]) == features[i]).all()
            assert xy[i][0] != xy[i][1]


def test_clam_finds_its_layout(data, tmp_path):
    exported(data, tmp_path, format="clam")
    name = name_of(data)
    cells, vectors = embedded(data)
    xy = np.array([(c * SIDE, r * SIDE) for r, c in cells])
    with h5py.File(tmp_path / "patches" / f"{name}.h5") as file:
        assert (file["coords"][:] == xy).all()
        told = dict(file["coords"].attrs)
    assert (told["patch_size"], told["patch_level"], told["name"]) == (SIDE, 0, name)
    assert told["downsample"].tolist() == [1.0, 1.0]
    assert told["level_dim"].tolist() == [660, 800]
    with h5py.File(tmp_path / "h5_files" / f"{name}.h5") as file:
        assert set(file) == {"features", "coords"}
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int32)
        assert (file["coords"][:] == xy).all()
        assert (file["features"][:] == vectors).all()
    loaded = torch.load(tmp_path / "pt_files" / f"{name}.pt", weights_only=True)
    assert (loaded.dtype, loaded.shape) == (torch.float32, vectors.shape)


def test_only_kept_tiles_go_out_on_demand(data, tmp_path):
    exported(data, tmp_path, cells="kept")
    tiles = tables.rows(data, "tiles").to_pylist()
    kept = {(t["row"], t["column"]) for t in tiles if t["kept"] and t["scale"] == 0}
    name = name_of(data)
    with h5py.File(tmp_path / "20x_64px_0px_overlap" / "features_toy" / f"{name}.h5") as file:
        found = [(y // SIDE, x // SIDE) for x, y in file["coords"][:].tolist()]
    assert set(found) == kept
    assert len(found) == len(kept) < len(embedded(data)[0])


def test_a_second_export_writes_nothing(data, tmp_path):
    assert exported(data, tmp_path)["made"] == 1
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.h5")}
    again = exported(data, tmp_path)
    assert (again["made"], again["cells"]) == (0, len(embedded(data)[0]))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.h5")} == before
    assert exported(data, tmp_path, cells="kept")["made"] == 1


def test_vectors_come_in_where_their_patches_lie(tiled, trident, tmp_path, tiny_slide):
    """Written by hand from pixels, so that a swap of x and y cannot cancel out."""
    with h5py.File(trident) as file:
        xy = file["coords"][:]
    with open_slide(tiny_slide) as slide:
        vectors = np.stack([seen(slide, x, y) for x, y in xy])
    write(tmp_path / "seen" / "tiny.h5", xy[::-1], vectors[::-1])  # in any order
    done = imported(tiled, tmp_path / "seen")
    assert (done["imported"], done["embedded"]) == (len(xy), 0)
    prepared(tmp_path / "own", tiny_slide)
    for mine, theirs in zip(embedded(tiled), embedded(str(tmp_path / "own")), strict=True):
        assert (np.array(mine) == np.array(theirs)).all()


@pytest.mark.parametrize(
    ("kind", "where"),
    [("clam", ""), ("trident", ""), pytest.param("trident", "s3", marks=pytest.mark.s3)],
)
def test_shard_goes_on_with_vectors_that_were_exported(
    data, tiled, tmp_path, tiny_slide, kind, where, request
):
    out = f"{request.getfixturevalue('s3_bucket')}/h5" if where else f"{tmp_path}/out"
    assert exported(data, out, format=kind)["made"] == 1
    assert exported(data, out, format=kind)["made"] == 0
    folder = {"clam": "h5_files", "trident": "20x_64px_0px_overlap/features_toy"}[kind]
    source = f"{out}/{folder}"
    done = imported(tiled, source, format=kind)
    assert done["made"] == done["parts"] == 4
    made = storage.read_json(f"{tiled}/embed.json")
    assert made["encoder"]["name"] == made["config"]["embed"]["encoder"] == "toy"
    assert made["config"]["embed"]["imported"] == kind
    prepared(tiled, tiny_slide, "shard")
    assert tables.rows(tiled, "examples").equals(tables.rows(data, "examples"))
    assert imported(tiled, source, format=kind)["made"] == 0


def test_clam_tells_the_width_of_a_patch_in_another_folder(data, tiled, tmp_path):
    cells, vectors = embedded(data)
    xy = [(c * SIDE, r * SIDE) for r, c in cells]
    told = {"patch_size": SIDE // 2, "patch_level": 1, "downsample": np.array([2.0, 2.0])}
    write(tmp_path / "features" / "h5_files" / "tiny.h5", xy, vectors, {})
    with pytest.raises(UserError, match=r"do not tell patch_size; give patches="):
        imported(tiled, tmp_path / "features", format="clam")
    write(tmp_path / "coords" / "tiny.h5", xy, None, told)
    more = {"format": "clam", "patches": str(tmp_path / "coords")}
    assert imported(tiled, tmp_path / "features", **more)["imported"] == len(cells)


def test_what_does_not_fit_is_refused_and_nothing_is_written(data, tiled, trident, tmp_path):
    cells, vectors = embedded(data)
    xy = [(c * SIDE, r * SIDE) for r, c in cells]
    name = name_of(tiled)
    shifted = [(x + 20, y) if i == 7 else (x, y) for i, (x, y) in enumerate(xy)]
    off = rf"x={xy[7][0] + 20}, y={xy[7][1]} does not lie on the grid of 64 .* \(1 of {len(xy)} do"
    wide = {**TOLD, "patch_size_level0": 128}
    other = {**TOLD, "level0_width": 800, "level0_height": 660}
    swapped, away = [(y, x) for x, y in xy], [(x - 6400, y) for x, y in xy]
    rows = rf"{len(xy) - 1} rows of features for {len(xy)} coords"
    r, c = cells[0]
    lacks = rf"lacks 2 of the {len(cells)} tiles .* first at row {r}, column {c}; set fill=true"
    for points, some, told, why in (
        (shifted, vectors, TOLD, off),
        (xy, vectors, wide, r"128 level-0 pixels wide and our tiles 64; .* tile\.mpp=0\.25 if"),
        (xy, vectors[:, :16], TOLD, r"16 channels \(shape \(\d+, 16\).* encoder=toy makes 32 ch"),
        (xy, vectors[:-1], TOLD, rows),
        (xy, None, TOLD, "holds no dataset 'features'"),
        (xy, vectors, other, r"of a slide of 800 x 660 level-0 pixels, and this one has 660 x 800"),
        (swapped, vectors, TOLD, r"patches begin outside the slide of 660 x 800 .* look swapped"),
        (away, vectors, TOLD, rf"^{len(xy)} of its {len(xy)} patches begin outside the slide"),
        (xy[2:], vectors[2:], TOLD, lacks),
    ):
        write(trident, points, some, told)
        with pytest.raises(UserError, match=why) as error:
            imported(tiled, trident.parent, fill=why is not lacks)  # gaps are no excuse
        assert name in str(error.value)
        assert "tiny.h5" not in str(error.value)
    trident.write_bytes(b"no h5")
    with pytest.raises(UserError, match="damaged or no HDF5 file"):
        imported(tiled, trident.parent)
    trident.rename(trident.with_name("other.h5"))
    with pytest.raises(UserError, match="no h5 file of its name"):
        imported(tiled, trident.parent)
    assert not Path(tiled, "embed.json").exists()
    assert not Path(tiled, "embeddings").exists()


def test_arrays_of_one_number_and_a_leading_axis_are_read(data, tiled, trident):
    cells, vectors = embedded(data)
    told = {"patch_size": np.array([SIDE]), "patch_size_level0": np.array([SIDE])}
    write(trident, [(c * SIDE, r * SIDE) for r, c in cells], vectors[None], told)
    done = imported(tiled, trident.parent)
    assert (done["imported"], done["unused"]) == (len(cells), 0)
    for mine, theirs in zip(embedded(tiled), embedded(data), strict=True):
        assert (np.array(mine) == np.array(theirs)).all()


def test_vectors_that_are_no_numbers_are_counted(data, tiled, trident):
    cells, vectors = embedded(data)
    bad = vectors.astype(np.float32)
    bad[3, 5], bad[7, 0] = np.nan, 1e5
    write(trident, [(c * SIDE, r * SIDE) for r, c in cells], bad)
    row, column = cells[3]
    where = rf"in 2 of {len(cells)} patches, the first at x={column * SIDE}, y={row * SIDE}; "
    with pytest.raises(UserError, match=where):
        imported(tiled, trident.parent)
    assert not Path(tiled, "embed.json").exists()


def test_tiles_that_the_files_lack_are_embedded_here(data, tiled, trident):
    cells, vectors = embedded(data)
    write(trident, [(c * SIDE, r * SIDE) for r, c in cells[5:]], vectors[5:] + 1)
    done = imported(tiled, trident.parent, fill=True)
    assert (done["imported"], done["embedded"] + done["blank"]) == (len(cells) - 5, 5)
    found, ours = embedded(tiled)
    assert found == cells
    assert (ours[5:] == (vectors[5:].astype(np.float32) + 1).astype(np.float16)).all()
    assert np.abs(ours[:5] - vectors[:5]).max() < 1e-2  # in another batch


def test_embeddings_of_our_own_are_not_overwritten(data, trident):
    with pytest.raises(UserError, match=r"holds embeddings that verbs=embed made"):
        imported(data, trident.parent)


def test_other_vectors_of_the_same_slides_take_their_place(tiled, trident, data):
    cells, vectors = embedded(data)
    imported(tiled, trident.parent)
    first = storage.read_json(f"{tiled}/embed.json")["digest"]
    write(trident, [(c * SIDE, r * SIDE) for r, c in cells], vectors * 2)
    assert imported(tiled, trident.parent)["made"] == 4
    assert storage.read_json(f"{tiled}/embed.json")["digest"] != first
    assert (embedded(tiled)[1] == vectors * 2).all()


def test_a_slide_without_a_file_can_be_skipped(tiny_slide, trident, tmp_path):
    from raylarge.slides import procedural

    procedural.write(str(tmp_path / "second.tif"), (400, 400), 1)
    root = str(tmp_path / "both")
    prepared(root, f"{tiny_slide},{tmp_path}/second.tif", "tile")
    imported(root, trident.parent, on_error="skip")
    made = storage.read_json(f"{root}/embed.json")
    assert len(made["lost"]) == 1
    failed = storage.read_table(f"{root}/failed.parquet").to_pylist()
    assert [row["verb"] for row in failed] == ["embed"]
    assert "second" not in failed[0]["reason"]


@pytest.mark.ray
def test_two_workers_import_the_same(tiled, trident, tiny_slide, tmp_path, ray_session):
    imported(tiled, trident.parent)
    prepared(tmp_path / "two", tiny_slide, "tile")
    imported(str(tmp_path / "two"), trident.parent, workers=2)
    one, two = (
        {path.name: path.read_bytes() for path in Path(root, "embeddings").iterdir()}
        for root in (tiled, tmp_path / "two")
    )
    assert one == two


def test_the_job_exports_and_imports(data, tiled, tmp_path):
    def job(*words):
        command = [sys.executable, "-m", "jobs.exchange", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    out = job("export=trident", f"data={data}", f"out={tmp_path}/out")
    assert out.returncode == 0, out.stderr
    source = f"{tmp_path}/out/20x_64px_0px_overlap/features_toy"
    done = job("import=trident", f"data={tiled}", f"source={source}", "encoder=toy")
    assert done.returncode == 0, done.stderr
    assert "imported" in done.stdout
    wrong = job("import=other", f"source={source}")
    assert wrong.returncode == 2
    assert "import=other: choose one of clam, trident, tissue, brca" in wrong.stderr
