"""HDF5 files of other tools: what is read in several layouts, and what is refused in words."""

import re

import numpy as np
import pytest

from raylarge.data.exchange import h5_read
from raylarge.errors import SlideError

h5py = pytest.importorskip("h5py")
XY = np.array([(0, 0), (64, 0), (0, 128)])
SIDE = {"patch_size_level0": 64}


def file_of(path, coords=XY, features=None, attributes=SIDE, **more):
    with h5py.File(path, "w") as file:
        if coords is not None:
            file.create_dataset("coords", data=coords).attrs.update(attributes)
        if features is not None:
            file.create_dataset("features", data=features)
        for name, values in more.items():
            file[name] = values
    return str(path)


@pytest.mark.parametrize(
    ("attributes", "side"),
    [
        ({"patch_size_level0": 256}, 256),
        ({"patch_size_level0": np.array([256])}, 256),
        ({"patch_size_level0": np.array([[256.0, 256.0]])}, 256),
        ({"patch_size_level0": "256"}, 256),
        ({"patch_size": np.array([64]), "patch_level": np.array([0])}, 64),
        ({"patch_size": 64, "patch_level": 2, "downsample": np.array([4.0, 4.001])}, 256),
        (
            {"patch_size": 64, "downsample": np.array([2.0]), "custom_downsample": np.array([2])},
            256,
        ),
    ],
)
def test_the_side_of_a_patch_is_read_from_any_spelling(tmp_path, attributes, side):
    path = file_of(tmp_path / "a.h5", attributes=attributes)
    assert h5_read.patches([path]).side_l0 == side


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        (
            {"patch_size_level0": np.array([256, 128])},
            r"patch_size_level0=\[256 128\], which is not",
        ),
        ({"patch_size_level0": 0}, "patch_size_level0=0; it must be above 0"),
        ({"patch_size_level0": -64}, "must be above 0"),
        ({"patch_size_level0": np.nan}, "which is not one number"),
        ({"patch_size_level0": "wide"}, "patch_size_level0=wide, which is not one number"),
        ({"patch_size": 64, "downsample": np.zeros(0)}, "downsample=.* not one number"),
        ({"patch_size": 64, "patch_level": 1}, "do not tell patch_size"),
        ({}, "do not tell patch_size; give patches="),
    ],
)
def test_a_side_that_is_none_is_refused(tmp_path, attributes, why):
    path = file_of(tmp_path / "a.h5", attributes=attributes)
    with pytest.raises(SlideError, match=why):
        h5_read.patches([path])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"coords": None, "imgs": 1}, "holds no 'coords' with values; it holds 'imgs'"),
        ({"coords": None}, "it holds nothing"),
        ({"coords": XY.T}, r"coords of shape \(2, 3\)"),
        ({"coords": XY.ravel()}, r"coords of shape \(6,\), not one row per patch \[N, 2\]"),
        ({"coords": np.array([[b"a", b"b"]])}, r"type \|S1, not the numbers"),
        (
            {"coords": np.array([(0.0, np.nan), (1, 1)])},
            r"in 1 of 2 patches, the first .* in row 0",
        ),
        ({"coords": np.array([(0, 1 << 62)])}, "coords that no slide has in 1 of 1"),
        ({"features": np.ones(3)}, r"features of shape \(3,\), not one row per patch \[N, D\]"),
        ({"features": np.ones((2, 3, 8))}, r"features of shape \(2, 3, 8\)"),
        ({"features": np.ones((3, 8), np.int32)}, "features of type int32"),
    ],
)
def test_what_is_no_table_of_patches_is_refused(tmp_path, content, why):
    with pytest.raises(SlideError, match=why):
        h5_read.patches([file_of(tmp_path / "a.h5", **content)])


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("lead", [(), (1,)])
def test_features_of_any_precision_are_read(tmp_path, kind, lead):
    values = np.random.default_rng(0).normal(size=(*lead, 3, 8)).astype(kind)
    path = file_of(tmp_path / "a.h5", features=values)
    layout = h5_read.patches([path])
    assert layout.features == (3, 8)
    assert (h5_read.vectors(path, layout) == values.reshape(3, 8).astype(np.float16)).all()


def test_one_patch_is_no_leading_axis(tmp_path):
    path = file_of(tmp_path / "a.h5", XY[:1], np.ones((1, 8)))
    assert h5_read.patches([path]).features == (1, 8)
    path = file_of(tmp_path / "b.h5", XY[None, :1], np.ones((1, 1, 8)))
    assert h5_read.patches([path]).features == (1, 8)


def test_a_file_that_claims_a_trillion_patches_is_refused_unread(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("coords", (1 << 40, 2), "i8", chunks=(1024, 2)).attrs.update(SIDE)
    with pytest.raises(SlideError, match=f"claims {1 << 40} patches; at most"):
        h5_read.patches([str(tmp_path / "a.h5")])


def test_coords_of_another_run_do_not_tell_the_side(tmp_path):
    features = file_of(tmp_path / "a.h5", features=np.ones((3, 8)), attributes={})
    same = file_of(tmp_path / "b.h5", XY[::-1])
    assert h5_read.patches([features, same]).side_l0 == 64
    other = file_of(tmp_path / "c.h5", XY * 2)
    with pytest.raises(SlideError, match=r"in patches= has 3 coords, not the 3 of the one with"):
        h5_read.patches([features, other])


def test_damage_of_any_kind_is_a_sentence(tmp_path):
    file_of(tmp_path / "a.h5", features=np.ones((3, 8)))
    raw = (tmp_path / "a.h5").read_bytes()
    draw = np.random.default_rng(0)
    changed = [b"", b"no h5", *(raw[:size] for size in range(1, len(raw) - 1, len(raw) // 12))]
    for place in draw.integers(0, min(len(raw), 2500), 60):
        changed.append(raw[:place] + bytes([int(draw.integers(256))]) + raw[place + 1 :])
    messages = []
    for content in changed:
        (tmp_path / "damaged.h5").write_bytes(content)
        try:
            layout = h5_read.patches([str(tmp_path / "damaged.h5")])
            h5_read.vectors(str(tmp_path / "damaged.h5"), layout)
        except SlideError as error:
            messages.append(str(error))
    assert len(messages) > 12
    assert all(re.match("its ", message) for message in messages)
    assert not any("damaged.h5" in message for message in messages)
