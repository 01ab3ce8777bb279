"""What is meant to be shared tells no path, user or machine: bundles, tables, images, reports."""

import getpass
import io
import json
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs import prepare, sample, train
from raylarge import storage
from raylarge.models import bundle, bundle_parts
from raylarge.slides import procedural

PRIVATE = ("names.json",)
"""The one file of a data folder that knows the files."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A freshly made data folder, bundle and image, by the jobs, from absolute paths."""
    root = tmp_path_factory.mktemp("someone-secret")
    slide = root / "slide-of-somebody.tif"
    procedural.write(str(slide), (700, 640), seed=7)
    table = root / "private-table.csv"
    table.write_text("slide,patient\nslide-of-somebody.tif,somebody\n")
    (root / "broken-slide.tif").write_bytes(b"no slide")
    data, out = f"data={root}/data", f"out={root}/bundle"
    tile = "tile.scales=[0,1,2] tile.patch_px=64 tile.tissue=[0.3,0.2] tile.crops=0 tile.split=band"
    words = [f"slides={root}/*.tif", f"out={root}/data", "on_error=skip", *tile.split()]
    words += ["tile.val_fraction=0.3", "tile.block_tiles=30", "embed.encoder=toy"]
    prepare.main([*words, f"tile.table={table}"])
    quick = ["steps=1", "batch=2", "super_block=1", "validate=0", data, out]
    train.main(["model=vae", "vae.width=8", "vae.blocks=1", *quick])
    prepare.main([*words, f"tile.table={table}", "verbs=encode", f"bundle={root}/bundle"])
    unet = ["ldm.unet.channels=[16,16]", "ldm.unet.attention=[false,true]", "ldm.unet.layers=1"]
    unet += ["ldm.unet.groups=8", "ldm.summarizer.width=16", "ldm.summarizer.layers=1"]
    train.main(["model=ldm", *unet, "ldm.summarizer.heads=2", *quick])
    train.main(["model=cdm", "cdm.width=16", "cdm.depth=1", "cdm.heads=2", *quick])
    order = ["order.size=128", "order.sampler.steps=1", "order.condition.kind=cdm"]
    sample.main([f"bundle={root}/bundle", *order, f"out={root}/image"])
    return root


def told(path):
    """All that a file says: its bytes, and what is packed in them."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        words = [str(pq.read_metadata(path).metadata), str(table.schema)]
        words += [str(table[name].to_pylist()) for name in table.column_names if name != "image"]
        content += "\n".join(words).encode()
    if path.suffix in (".png", ".tif"):
        picture = Image.open(io.BytesIO(content))
        info = {**picture.info, **dict(getattr(picture, "tag_v2", {}))}
        content += str(info).encode()
    return content


def shared(root):
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return [path for path in files if path.name not in PRIVATE]


@pytest.mark.parametrize("folder", ["bundle", "data", "image"])
def test_no_file_tells_where_or_by_whom_it_was_made(made, folder):
    files = [path for path in shared(made / folder) if ".train" not in path.parts]
    assert len(files) > 4
    secrets = [str(made), made.name, "somebody", str(Path.home())]
    secrets += [one for one in (socket.gethostname(), getpass.getuser()) if len(one) > 4]
    for path in files:
        for secret in secrets:
            assert secret.encode() not in told(path), f"{path.relative_to(made)} tells {secret}"


def test_working_files_of_a_training_tell_no_place_of_data(made):
    for path in shared(made / "bundle" / ".train"):
        assert str(made).encode() not in path.read_bytes(), path


def test_settings_stay_without_their_places(made):
    facts = bundle.facts(str(made / "bundle"))
    config = facts["ldm"]["config"]
    assert config["batch"] == 2
    assert not config.keys() & set(bundle_parts.PATH_KEYS)
    assert storage.read_json(f"{made}/data/tile.json")["config"]["tile"]["patch_px"] == 64


def test_the_same_order_again_finds_its_files(made, capsys):
    order = ["order.size=128", "order.sampler.steps=1", "order.condition.kind=cdm"]
    sample.main([f"bundle={made}/bundle", *order, f"out={made}/image"])
    assert "nothing is left to do" in capsys.readouterr().out


def test_an_older_bundle_forgets_its_places_when_a_part_is_added(made, tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    config = {"data": "/home/someone/data", "out": "/x/b", "lr": 1.0, "ldm": {"init": "/a/b.ckpt"}}
    old = {"raylarge": {"format": 2, "ldm": {"config": config}, "licence": "https://a.org/terms"}}
    (folder / "model_index.json").write_text(json.dumps(old))
    bundle.save(str(folder), {}, {"patch_px": 32})
    facts = bundle.facts(str(folder))
    assert facts["ldm"]["config"] == {"lr": 1.0, "ldm": {"init": "b.ckpt"}}
    assert facts["licence"] == "https://a.org/terms"


def test_a_part_forgets_where_diffusers_loaded_it_from(made, tmp_path):
    vae = bundle.load_autoencoder(str(made / "bundle")).network
    vae.register_to_config(_name_or_path="/home/someone/vae")
    bundle.save(str(tmp_path / "b"), {"vae": vae}, {"patch_px": 64})
    assert b"someone" not in (tmp_path / "b" / "vae" / "config.json").read_bytes()
    bundle.load_autoencoder(str(tmp_path / "b"))


def test_places_are_reduced_to_names():
    document = {"a": ["/x/y.csv", "s3://bucket/k/", "masks/{name}.png", 3], "b": {"c": "~/q/t"}}
    expected = {"a": ["y.csv", "k", "masks/{name}.png", 3], "b": {"c": "t"}}
    assert storage.without_folders(document) == expected


PLANNED = {
    "vae": [],
    "ldm": [],
    "cdm": [],
    "standardised cdm": ["model=cdm", "cdm.standardised=true"],
    "cdm of a preset": ["model=cdm", "preset=tiny"],
    "controlnet": [],
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_on_data_is_a_table_and_writes_nothing(made, capsys, name):
    before = {path: path.stat().st_mtime_ns for path in sorted(made.rglob("*"))}
    words = PLANNED[name] or [f"model={name}"]
    train.main([*words, f"data={made}/data", f"out={made}/bundle", "plan=true"])
    assert "It fits" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in sorted(made.rglob("*"))} == before
