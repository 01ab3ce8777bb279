"""The data engine with slides and tables in S3, over HTTP, on a server that comes and goes."""

import threading
import time
from pathlib import Path

import pytest
import servers
from servers import keys

from raylarge import storage, tables
from raylarge.data.prepare import prepare
from raylarge.errors import UserError
from raylarge.report import Report

pytestmark = pytest.mark.s3
machine, store = servers.machine, servers.store  # fixtures


@pytest.fixture
def expected(tiny_prepare, tmp_path):
    """What the verbs make of the slide on a disk."""
    config = tiny_prepare(out=str(tmp_path / "here"))
    prepare(config, Report(str(tmp_path / "here.json")))
    root = tmp_path / "here"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def config(store, tiny_slide, tiny_prepare, monkeypatch, tmp_path):
    """The same slide in the bucket, and its tables to be made there."""
    monkeypatch.setenv("RAYLARGE_CACHE", str(tmp_path / "cache"))
    storage.write_bytes(f"{store.root}/slides/tiny.tif", Path(tiny_slide).read_bytes())
    return tiny_prepare(slides=f"{store.root}/slides/*.tif", out=f"{store.root}/data")


def run(config, tmp_path):
    return prepare(config, Report(str(tmp_path / "r.json")))


def made(config, expected):
    """The tables and manifests in the bucket; `names.json` tells of another place."""
    names = [name for name in expected if name != "names.json"]
    return {name: storage.read_bytes(f"{config.out}/{name}") for name in names}


def without_names(expected):
    return {name: content for name, content in expected.items() if name != "names.json"}


def stop_when(store, count):
    """Stop the server as soon as so many parts are embedded."""
    while sum("embeddings/" in key for key in keys(store)) < count:
        time.sleep(0.02)
    store.stop()


def test_slides_and_tables_in_a_bucket_are_those_of_a_disk(config, expected, store, tmp_path):
    run(config, tmp_path)
    assert made(config, expected) == without_names(expected)
    assert {key.removeprefix("data/") for key in keys(store) if "data/" in key} == set(expected)
    assert [facts["made"] for facts in run(config, tmp_path).values()] == [0, 0, 0]


def test_a_server_that_stops_and_comes_back_costs_waiting_alone(
    config, expected, store, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "60")

    def pause():
        stop_when(store, 2)
        time.sleep(1.0)
        store.start()

    thread = threading.Thread(target=pause)
    thread.start()
    done = run(config, tmp_path)
    thread.join()
    assert done["embed"]["made"] == 4
    assert made(config, expected) == without_names(expected)


def test_a_server_that_stays_away_ends_the_run_and_the_next_goes_on(
    config, expected, store, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "1")
    thread = threading.Thread(target=stop_when, args=(store, 2))
    thread.start()
    with pytest.raises(UserError, match=rf"{store.root}/data/.*"):
        run(config, tmp_path)
    thread.join()
    store.start()
    before = [key for key in keys(store) if "embeddings/" in key]
    assert 2 <= len(before) <= 4
    for key in before:  # none is half there
        assert storage.read_table(f"{store.root}/{key}").num_rows == 3
    assert "data/embed.json" not in keys(store)
    done = run(config, tmp_path)
    assert done["tile"]["made"] == 0
    assert done["embed"]["made"] == 4 - len(before)
    assert made(config, expected) == without_names(expected)


def test_a_key_that_goes_away_is_a_row_and_one_that_never_was_an_error(
    config, store, tmp_path, tiny_prepare, monkeypatch
):
    slides = f"{store.root}/slides/"
    with pytest.raises(UserError, match=r"no slide fits .*gone\.svs"):
        run(tiny_prepare(slides=f"{slides}tiny.tif,{slides}gone.svs", out=config.out), tmp_path)
    storage.write_bytes(f"{slides}late.tif", b"II*\0")
    find = "raylarge.data.prepare.find_slides"
    monkeypatch.setattr(find, lambda words: [f"{slides}late.tif", f"{slides}tiny.tif"])
    storage.remove(f"{slides}late.tif")  # after it was listed
    skipping = tiny_prepare(slides=config.slides, out=config.out, on_error="skip")
    assert run(skipping, tmp_path)["tile"]["failed"] == 1
    (row,) = storage.read_table(f"{config.out}/failed.parquet").to_pylist()
    assert "does not exist" in row["reason"]
    assert "late" not in row["reason"]
    assert tables.rows(config.out, "examples").num_rows > 30
