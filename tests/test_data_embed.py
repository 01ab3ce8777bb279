from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from raylarge import pyramid, storage
from raylarge.data.prepare import prepare
from raylarge.errors import UserError
from raylarge.models import ssl
from raylarge.report import Report
from raylarge.slides.reader import open_slide


@pytest.fixture
def run(tmp_path):
    return lambda config: prepare(config, Report(str(tmp_path / "report.json")))


def rows_of(folder):
    tables = [storage.read_table(path) for path in storage.glob(f"{folder}/*.parquet")]
    return [row for table in tables for row in table.to_pylist()]


def vectors(rows):
    """The valid cells of EMBEDDINGS and their vectors."""
    found = {}
    for row in rows:
        grid = np.array(row["embedding"], np.float16).reshape(row["columns"], -1)
        found |= {(row["row"], c): grid[c] for c in range(row["columns"]) if row["valid"][c]}
        assert not grid[~np.array(row["valid"])].any()
    return found


def covered(root):
    cells = set()
    for row in rows_of(f"{root}/tiles"):
        factor = 1 << row["scale"] if row["kept"] else 0
        for r in range(factor):
            cells |= {(row["row"] + r, row["column"] + c) for c in range(factor)}
    return cells


def test_each_covered_tile_has_one_raw_vector(tiny_prepare, run, tiny_slide):
    config = tiny_prepare(verbs="tile,embed")
    facts = run(config)["embed"]
    rows = rows_of(f"{config.out}/embeddings")
    assert [row["row"] for row in rows] == list(range(12))  # dense, whatever is covered
    found = vectors(rows)
    assert set(found) == covered(config.out)
    assert len(found) == facts["embedded"] + facts["blank"] < 12 * 10
    assert facts["parts"] == 4  # blocks of three rows of ten tiles
    encoder = ssl.load("toy")
    with open_slide(tiny_slide) as slide:
        for row, column in found:
            tile = slide.read(row * 64, column * 64, 64, 64)
            expected = encoder(np.stack([tile] * 8))[0]
            assert (found[row, column] == expected).all()


def test_tiles_of_one_colour_are_embedded_once(tiny_prepare, run, tmp_path, monkeypatch):
    page = np.full((640, 640, 3), 255, np.uint8)
    page[:128, :192] = np.random.default_rng(0).integers(0, 255, (128, 192, 3))
    page[320:384, 64:128] = (200, 120, 170)
    pyramid.write_image(str(tmp_path / "page.tif"), page, 0.5)
    sizes = []
    call = ssl.Encoder.__call__

    def watched(self, images):
        sizes.append(len({image.tobytes() for image in images}))
        return call(self, images)

    monkeypatch.setattr(ssl.Encoder, "__call__", watched)
    tile = {"tissue": [0.0], "scales": [0], "block_tiles": 1000, "split": "patient"}
    config = tiny_prepare(slides=str(tmp_path / "page.tif"), verbs="tile,embed", tile=tile)
    facts = run(config)["embed"]
    assert (facts["embedded"], facts["blank"]) == (6, 94)
    assert sorted(sizes) == [1, 1, 6]  # white, pink, and a batch of the others
    found = vectors(rows_of(f"{config.out}/embeddings"))
    white, pink = (
        ssl.load("toy")(np.stack([page[r : r + 64, c : c + 64]] * 8))[0]
        for r, c in ((576, 576), (320, 64))
    )
    assert (found[5, 1] == pink).all()
    assert (found[9, 9] == white).all()
    assert (found[0, 3] == white).all()


def test_gpus_that_are_not_there_are_missed_in_words(tiny_prepare, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"gpus=0\.5: this machine has no CUDA device; leave gpus="):
        run(tiny_prepare(verbs="tile,embed", embed={"gpus": 0.5}))
    with pytest.raises(UserError, match=r"actors=0: give 1 or more"):
        tiny_prepare(embed={"actors": 0})


def test_a_lower_precision_is_another_table(tiny_prepare, run):
    config = tiny_prepare(verbs="tile,embed", embed={"encoder": "efficientnet_lite0"})
    run(config)
    exact = vectors(rows_of(f"{config.out}/embeddings"))
    half = {"encoder": "efficientnet_lite0", "dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"embed\.dtype=float32, not bfloat16"):
        run(tiny_prepare(verbs="embed", embed=half))
    with pytest.raises(UserError, match=r"embed\.dtype=int8: choose one of float32"):
        run(tiny_prepare(verbs="embed", embed={"dtype": "int8"}))
    other = tiny_prepare(out=config.out + "2", verbs="tile,embed", embed=half)
    run(other)
    rough = vectors(rows_of(f"{other.out}/embeddings"))
    a, b = (np.stack([found[key] for key in exact]).astype(float) for found in (exact, rough))
    error = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert 1e-4 < error < 0.1


def test_batches_never_reach_over_a_block(tiny_prepare, run, monkeypatch):
    sizes = []
    call = ssl.Encoder.__call__

    def watched(self, images):
        sizes.append(len(images))
        return call(self, images)

    monkeypatch.setattr(ssl.Encoder, "__call__", watched)
    config = tiny_prepare(verbs="tile,embed")
    run(config)
    assert set(sizes) == {8}  # padded, whatever is left of a block
    parts = storage.read_json(f"{config.out}/embed.json")["parts"]
    assert len(sizes) == sum(-(-one["embedded"] // 8) for one in parts)


def test_the_manifest_names_the_encoder(tiny_prepare, run):
    config = tiny_prepare(verbs="tile,embed")
    run(config)
    manifest = storage.read_json(f"{config.out}/embed.json")
    assert manifest["encoder"] == {**ssl.card("toy").as_json(), "weights": ""}
    assert manifest["encoder"]["width"] == 32
    assert "weights" not in manifest["config"]["embed"]


def test_weights_count_by_their_content_and_their_path_is_told_to_nobody(
    tiny_prepare, run, tmp_path
):
    first, second = (tmp_path / folder / "weights.pth" for folder in ("first", "second"))
    for path in (first, second):
        path.parent.mkdir()
        torch.manual_seed(0)
        torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    vit = {"encoder": "timm:test_vit", "batch": 64}
    config = tiny_prepare(verbs="tile,embed,shard", embed={**vit, "weights": str(first)})
    run(config)
    digest = storage.digest_file(first)
    for verb in ("embed", "shard"):
        manifest = storage.read_json(f"{config.out}/{verb}.json")
        assert manifest["encoder"]["weights"] == manifest["config"]["embed"]["weights"] == digest
        assert manifest["encoder"]["width"] == 64
        assert "weights.pth" not in str(manifest)
    moved = tiny_prepare(verbs="embed,shard", embed={**vit, "weights": str(second)})
    assert [facts["made"] for facts in run(moved).values()] == [0, 0]  # the same content
    torch.save({"other": torch.zeros(1)}, second)
    told = rf"embed\.weights={digest}, not {storage.digest_file(second)}"
    with pytest.raises(UserError, match=told):
        run(moved)
    with pytest.raises(UserError, match=r"no weights at .*gone\.pth; check the path"):
        run(tiny_prepare(verbs="embed", embed={**vit, "weights": str(tmp_path / "gone.pth")}))


def test_a_rerun_makes_nothing_and_a_lost_part_comes_back(tiny_prepare, run, monkeypatch):
    config = tiny_prepare(verbs="tile,embed")
    run(config)
    paths = storage.glob(f"{config.out}/*/*.parquet") + storage.glob(f"{config.out}/*.json")
    before = {path: storage.read_bytes(path) for path in paths}
    monkeypatch.setattr(ssl, "load", lambda *_: pytest.fail("nothing is left to embed"))
    assert [facts["made"] for facts in run(config).values()] == [0, 0]
    monkeypatch.undo()
    fs_path = storage.glob(f"{config.out}/embeddings/*.parquet")[1]
    Path(fs_path).unlink()
    assert [facts["made"] for facts in run(config).values()] == [0, 1]
    assert {path: storage.read_bytes(path) for path in paths} == before


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"embed": {"encoder": "efficientnet_lite0"}},
            r"embed\.encoder=toy, not efficientnet_lite0",
        ),
        ({"tile": {"patch_px": 32}}, r"tile\.patch_px=64, not 32"),
        ({"tile": {"crops": 0}}, r"tile\.crops=8, not 0"),
    ],
)
def test_another_config_is_not_mixed_in(tiny_prepare, run, other, told):
    config = tiny_prepare(verbs="tile,embed")
    run(config)
    with pytest.raises(UserError, match=rf"was made with {told}; choose another out= or delete"):
        run(tiny_prepare(verbs="tile,embed", **other))
    with pytest.raises(UserError, match=told):
        run(tiny_prepare(verbs="embed", **other))


def test_parts_of_an_unfinished_run_with_another_config_are_made_anew(tiny_prepare, run):
    config = tiny_prepare(verbs="tile,embed")
    run(config)
    mine = storage.glob(f"{config.out}/embeddings/*.parquet")
    before = [storage.read_bytes(path) for path in mine]
    Path(f"{config.out}/embed.json").unlink()  # as if killed before the end
    assert run(tiny_prepare(verbs="embed", embed={"batch": 16}))["embed"]["made"] == 4
    assert [storage.read_bytes(path) for path in mine] != before  # the stamp differs


def test_embed_wants_tile_first_and_a_known_encoder(tiny_prepare, run):
    with pytest.raises(UserError, match=r"embed needs .*tile\.json; run verbs=tile"):
        run(tiny_prepare(verbs="embed"))
    with pytest.raises(UserError, match=r"no encoder 'uni9'"):
        run(tiny_prepare(verbs="tile,embed", embed={"encoder": "uni9"}))
