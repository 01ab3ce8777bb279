import functools
import http.server
import os
import threading

import fsspec.implementations.http
import numpy as np
import pytest

from raylarge import pyramid, storage
from raylarge.errors import SlideError, UserError
from raylarge.slides import fetch
from raylarge.slides.fetch import companions, fetch_slide
from raylarge.slides.protocol import UnreadableSlide
from raylarge.slides.reader import open_slide
from raylarge.storage import cache as slide_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLARGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "1")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (100, 130, 3), dtype=np.uint8)


def put(url, content):
    with fsspec.open(url, "wb") as stream:
        stream.write(content)


def local_copy(url):
    held = fetch_slide(url)
    held.close()
    return held.path


def files(cache):
    return {p: p.stat().st_mtime_ns for p in cache.rglob("*") if p.is_file() and p.suffix == ".tif"}


@pytest.mark.s3
def test_an_object_is_fetched_once_per_version(s3_bucket, image, cache):
    url = f"{s3_bucket}/slides/made.tif"
    pyramid.write_image(url, image, 0.5)
    first = local_copy(url)
    assert os.path.basename(first) == "made.tif"
    before = files(cache)
    with open_slide(url) as slide:
        assert slide.path == url
        assert (slide.read(0, 0, *slide.size_px) == image).all()
    assert files(cache) == before
    pyramid.write_image(url, image[::-1], 0.5)
    assert local_copy(url) != first
    with open_slide(url) as slide:
        assert (slide.read(0, 0, *slide.size_px) == image[::-1]).all()


@pytest.mark.s3
def test_a_missing_object_is_one_sentence(s3_bucket):
    url = f"{s3_bucket}/slides/other.tif"
    with pytest.raises(
        SlideError, match=rf"^slide {url}: the file does not exist; check the path\.$"
    ):
        open_slide(url)


@pytest.mark.s3
def test_a_slide_in_use_stays_in_the_cache(s3_bucket, image, monkeypatch):
    for name in "ab":
        pyramid.write_image(f"{s3_bucket}/full/{name}.tif", image, 0.5)
    first = f"{s3_bucket}/full/a.tif"
    size = os.path.getsize(local_copy(first))
    monkeypatch.setenv("RAYLARGE_CACHE_BYTES", str(size * 3 // 2))
    monkeypatch.setattr(slide_cache, "WAIT_S", 0.0)
    monkeypatch.setattr(slide_cache, "POLL_S", 0.01)
    with (
        open_slide(first) as slide,
        pytest.raises(
            UserError, match=rf"full/b\.tif: the file needs up to {size:,} bytes .* in use"
        ) as told,
    ):
        open_slide(f"{s3_bucket}/full/b.tif")
    assert told.type is UserError
    assert (slide.path, slide.size_px) == (first, (100, 130))
    with open_slide(f"{s3_bucket}/full/b.tif") as slide:
        assert (slide.read(0, 0, 100, 130) == image).all()
    with open_slide(first) as slide:
        assert (slide.read(0, 0, 100, 130) == image).all()


@pytest.mark.s3
def test_a_mirax_slide_brings_its_folder(s3_bucket):
    put(f"{s3_bucket}/mirax/case.mrxs", b"index")
    with pytest.raises(
        UnreadableSlide, match=r"MIRAX index, and nothing is found in the folder .*case/"
    ):
        fetch_slide(f"{s3_bucket}/mirax/case.mrxs")
    put(f"{s3_bucket}/mirax/case/Slidedat.ini", b"first")
    put(f"{s3_bucket}/mirax/case/Data0000.dat", b"12345")
    held = fetch_slide(f"{s3_bucket}/mirax/case.mrxs")
    beside = held.path.removesuffix(".mrxs")
    with open(held.path, "rb") as index, open(f"{beside}/Slidedat.ini", "rb") as first:
        assert (index.read(), first.read()) == (b"index", b"first")
    assert sorted(os.listdir(beside)) == ["Data0000.dat", "Slidedat.ini"]
    held.close()
    put(f"{s3_bucket}/mirax/case/Data0000.dat", b"54321")
    again = fetch_slide(f"{s3_bucket}/mirax/case.mrxs")
    assert again.path != held.path  # a change in the folder is another version
    again.close()


@pytest.mark.s3
def test_folders_and_indices_are_refused(s3_bucket):
    put(f"{s3_bucket}/many/a.svs", b"a")
    with pytest.raises(SlideError, match=r"many: the folder holds no DICOM instances"):
        open_slide(f"{s3_bucket}/many")
    put(f"{s3_bucket}/many/b.vms", b"a")
    with pytest.raises(
        SlideError, match=r"b\.vms: the file is an index of several files; copy all of them"
    ):
        open_slide(f"{s3_bucket}/many/b.vms")


@pytest.fixture
def web(tmp_path):
    """The address of a web server that shows a folder."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web")
    )
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_web_address_is_fetched_too(web, tmp_path, image, cache):
    pyramid.write_image(str(tmp_path / "web/made.tif"), image, 0.5)
    for url in (f"{web}/made.tif", f"{web}/made.tif?token=1"):
        with open_slide(url) as slide:
            assert (slide.read(0, 0, *slide.size_px) == image).all()
    with pytest.raises(SlideError, match=r"nowhere\.tif: the file does not exist; check the path"):
        open_slide(f"{web}/nowhere.tif")
    (tmp_path / "web/case.mrxs").write_bytes(b"index")
    with pytest.raises(UserError, match="MIRAX index, and nothing is found in the folder"):
        open_slide(f"{web}/case.mrxs")


@pytest.fixture
def fetching(monkeypatch):
    """Lets a function fetch web addresses, for one test: file systems keep what they began with."""
    system = fsspec.implementations.http.HTTPFileSystem

    def by(function):
        monkeypatch.setattr(system, "_get_file", function)
        system.clear_instance_cache()

    yield by
    monkeypatch.undo()
    system.clear_instance_cache()


def test_a_full_disk_while_fetching_is_one_sentence(web, tmp_path, fetching, cache):
    async def full(self, source, target, **_):
        with open(target, "wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "web/made.tif").write_bytes(b"x" * 100)
    fetching(full)
    with pytest.raises(
        UserError, match=r"made\.tif: the file does not fit on the disk of the cache .*larger"
    ) as told:
        open_slide(f"{web}/made.tif")
    assert told.type is UserError
    assert list(cache.rglob("made.tif")) == []


@pytest.mark.parametrize("url", ["nosuch://bucket/a.svs", "http://127.0.0.1:9/a.svs"])
def test_what_cannot_be_reached_is_one_sentence(url):
    with pytest.raises(UserError, match=r"^[^\n]*a\.svs[^\n]*\.$") as told:
        open_slide(url)
    assert told.type is UserError


@pytest.fixture
def memory():
    """A folder of a store that is neither S3 nor the web."""
    fs = fsspec.filesystem("memory")
    yield "memory://slides"
    fs.rm("/slides", recursive=True)


@pytest.fixture
def lanes(monkeypatch):
    """Pieces of 1000 bytes; which of them were asked for."""
    asked = []
    read = storage.read_range

    def spied(url, start, stop, etag=None):
        asked.append((start, stop))
        return read(url, start, stop, etag)

    monkeypatch.setattr(fetch, "RANGE_BYTES", 1000)
    monkeypatch.setattr(storage, "read_range", spied)
    return asked


@pytest.mark.parametrize("size", [0, 1, 1000, 1001, 12_345])
def test_a_large_object_comes_in_ranges(memory, lanes, size):
    content = np.random.default_rng(0).bytes(size)
    put(f"{memory}/large.tif", content)
    with open(local_copy(f"{memory}/large.tif"), "rb") as stream:
        assert stream.read() == content
    assert sorted(lanes) == [(at, min(at + 1000, size)) for at in range(0, size, 1000)]


@pytest.mark.s3
def test_ranges_of_s3_are_of_one_version(s3_bucket, lanes, monkeypatch):
    url, read = f"{s3_bucket}/slides/large.bin", storage.read_range
    contents = [np.random.default_rng(seed).bytes(5500) for seed in range(2)]
    put(url, contents[0])

    def overtaken(url, start, stop, etag=None):
        if len(lanes) == 3:
            put(url, contents[1])
        return read(url, start, stop, etag)

    monkeypatch.setattr(storage, "read_range", overtaken)
    with open(local_copy(url), "rb") as stream:
        assert stream.read() == contents[1]


def test_a_slide_that_never_stops_changing_is_refused(memory, lanes, monkeypatch, cache):
    read = storage.read_range

    def overtaken(url, start, stop, etag=None):
        put(url, b"x" * (2501 + len(lanes)))
        return read(url, start, stop, etag)

    put(f"{memory}/live.tif", b"x" * 2500)
    monkeypatch.setattr(storage, "read_range", overtaken)
    monkeypatch.setattr(fetch, "LANES", 1)
    with pytest.raises(SlideError, match=r"live\.tif: the file changes while it is fetched"):
        open_slide(f"{memory}/live.tif")
    assert list(cache.rglob("live.tif")) == []


def test_a_range_that_fails_for_good_leaves_nothing(memory, lanes, monkeypatch, cache):
    read = storage.read_range

    def failing(url, start, stop, etag=None):
        if start == 3000:
            raise UserError(f"{url}: the store is away.")
        return read(url, start, stop, etag)

    put(f"{memory}/large.tif", b"x" * 9000)
    monkeypatch.setattr(storage, "read_range", failing)
    with pytest.raises(UserError, match="the store is away") as told:
        open_slide(f"{memory}/large.tif")
    assert told.type is UserError
    assert list(cache.rglob("large.tif")) == []


def test_a_stream_that_is_cut_short_is_no_fault_of_the_slide(web, tmp_path, fetching, cache):
    async def short(self, source, target, **_):
        with open(target, "wb") as stream:
            stream.write(b"half")

    (tmp_path / "web/made.tif").write_bytes(b"x" * 100)
    fetching(short)
    with pytest.raises(UserError, match="4 of 100 bytes came") as told:
        open_slide(f"{web}/made.tif")
    assert told.type is UserError
    assert list(cache.rglob("made.tif")) == []


def test_companions_are_the_other_files_of_a_slide(memory, tmp_path):
    for root in (memory, str(tmp_path / "slides")):
        for name in ("case.mrxs", "case/Slidedat.ini", "case/Data0000.dat", "case.svs", "case2/x"):
            if root != memory:
                (tmp_path / "slides" / name).parent.mkdir(parents=True, exist_ok=True)
            put(f"{root}/{name}", b"x")
        beside = [f"{root}/case/{name}" for name in ("Data0000.dat", "Slidedat.ini")]
        assert companions(f"{root}/case.mrxs") == beside
        assert companions(f"{root}/case.svs") == []
        assert companions(f"{root}/case") == companions(f"{root}/case/") == beside  # as of DICOM
        assert companions(f"{root}/nowhere.mrxs") == []
