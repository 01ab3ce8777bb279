"""What exchange with CLAM and TRIDENT fetches, and what a second run makes anew."""

import re
from pathlib import Path

import numpy as np
import pytest
import test_data_exchange_h5
from test_data_exchange_h5 import SIDE, embedded, exported, imported, name_of, prepared, write

from raylarge import storage
from raylarge.data.exchange import h5_read
from raylarge.errors import UserError
from raylarge.slides import procedural
from raylarge.storage import objects

pytest.importorskip("h5py")
data, tiled = test_data_exchange_h5.data, test_data_exchange_h5.tiled
trident = test_data_exchange_h5.trident


@pytest.fixture
def pair(tiny_slide, tmp_path):
    """A folder with tiles of two slides, and TRIDENT's files for both."""
    procedural.write(str(tmp_path / "second.tif"), (400, 400), 1)
    slides = f"{tiny_slide},{tmp_path}/second.tif"
    prepared(tmp_path / "both", slides, "tile,embed")
    exported(str(tmp_path / "both"), tmp_path / "out")
    prepared(tmp_path / "pair", slides, "tile")
    return str(tmp_path / "pair"), tmp_path / "out" / "20x_64px_0px_overlap" / "features_toy"


def stamps(root):
    parts = storage.read_json(f"{root}/embed.json")["parts"]
    return {one["part"]: one["stamp"] for one in parts}


def change(path, factor=2):
    """Other vectors in a file."""
    with h5_read.library().File(path, "a") as file:
        file["features"][:] = file["features"][:] * factor


def test_slides_are_not_opened(tmp_path):
    slide = tmp_path / "slide.tif"
    procedural.write(str(slide), (512, 384), 3, mpp=0.25)
    for name in ("one", "two"):
        prepared(tmp_path / name, str(slide), "tile,embed" if name == "one" else "tile")
    slide.unlink()
    root = str(tmp_path / "one")
    assert exported(root, tmp_path / "out")["made"] == 1
    source = tmp_path / "out" / "20x_64px_0px_overlap" / "features_toy"
    other = str(tmp_path / "two")
    done = imported(other, source)
    assert (done["imported"], done["embedded"]) == (len(embedded(root)[0]), 0)
    assert (embedded(other)[1] == embedded(root)[1]).all()
    Path(other, "embed.json").unlink()
    assert imported(other, source, fill=True)["embedded"] == 0  # no gap, no slide


def test_gaps_open_the_slide(tmp_path):
    slide = tmp_path / "slide.tif"
    procedural.write(str(slide), (512, 384), 3)
    root = str(tmp_path / "data")
    prepared(root, str(slide), "tile", mask="all")
    layout = {"patch_size_level0": SIDE}
    write(tmp_path / "h5" / "slide.h5", [(SIDE, 0)], np.ones((1, 32)), layout)
    slide.rename(tmp_path / "away.tif")
    with pytest.raises(UserError, match=name_of(root)) as error:
        imported(root, tmp_path / "h5", fill=True)
    assert "slide.tif" not in str(error.value)
    (tmp_path / "away.tif").rename(slide)
    done = imported(root, tmp_path / "h5", fill=True)
    assert (done["imported"], done["embedded"] + done["blank"]) == (1, 47)


def test_another_file_changes_its_own_slide_alone(pair):
    root, source = pair
    assert imported(root, source)["made"] > 0
    before = stamps(root)
    path = sorted(source.iterdir())[0]
    change(path)
    mine = {part for part in before if path.stem in part}
    done = imported(root, source)
    assert 0 < done["made"] == len(mine) < done["parts"]
    assert {part for part, stamp in stamps(root).items() if stamp != before[part]} == mine


def test_one_more_slide_leaves_the_others_alone(pair):
    root, source = pair
    path = sorted(source.iterdir())[0]
    aside = path.rename(source.parent / path.name)
    first = imported(root, source, on_error="skip")
    before = stamps(root)
    aside.rename(path)
    done = imported(root, source)
    assert done["made"] == done["parts"] - first["parts"] > 0
    assert before.items() <= stamps(root).items()


def test_examples_follow_their_vectors(pair, tiny_slide, tmp_path):
    root, source = pair
    slides = f"{tiny_slide},{tmp_path}/second.tif"
    imported(root, source)
    blocks = prepared(root, slides, "shard")["shard"]["blocks_made"]
    assert imported(root, source)["made"] == 0
    change(sorted(source.iterdir())[0])
    assert imported(root, source)["made"] > 0
    again = prepared(root, slides, "shard")["shard"]
    assert 0 < again["blocks_made"] < blocks  # those of the slide whose vectors are new


def test_slides_without_a_fitting_file_are_left_out(pair):
    root, source = pair
    sorted(source.iterdir())[0].write_bytes(b"no h5")
    with pytest.raises(UserError, match="damaged or no HDF5 file") as error:
        imported(root, source)
    assert not re.search(r"tiny|second", str(error.value))
    imported(root, source, on_error="skip")
    assert len(storage.read_json(f"{root}/embed.json")["lost"]) == 1


@pytest.mark.s3
def test_of_files_in_a_store_only_what_is_needed_is_read(data, tmp_path, s3_bucket, monkeypatch):
    exported(data, f"{s3_bucket}/rerun")
    name = f"20x_64px_0px_overlap/features_toy/{name_of(data)}.h5"
    size = len(storage.read_bytes(f"{s3_bucket}/rerun/{name}"))
    fetched, read = [], objects.read_range

    def counted(path, start, stop, *more):
        fetched.append(stop - start)
        return read(path, start, stop, *more)

    monkeypatch.setattr(objects, "read_range", counted)
    monkeypatch.setattr(h5_read, "_READ_BYTES", 1024)
    assert exported(data, f"{s3_bucket}/rerun")["made"] == 0
    assert 0 < sum(fetched) < size / 2


def test_a_store_that_refuses_does_not_tell_the_file(monkeypatch):
    def refusing(path):
        raise UserError(f"{path}: access denied")

    monkeypatch.setattr(h5_read, "Ranges", refusing)
    with (
        pytest.raises(UserError, match=r"^its h5: access denied"),
        h5_read.opened("s3://b/name.h5"),
    ):
        pass
