"""Storage when servers stop, lines break and stores are busy: all over real HTTP."""

import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import servers
from s3fs import S3FileSystem
from servers import content_of, keys

from raylarge import storage
from raylarge.errors import UserError
from raylarge.storage import objects, retry

machine, store = servers.machine, servers.store  # fixtures
pytestmark = pytest.mark.s3
BIG = 3 << 20


@pytest.mark.parametrize("kind", ["cut", "close"])
@pytest.mark.parametrize("upwards", [True, False])
def test_a_line_that_breaks_in_a_body_is_not_noticed(store, kind, upwards):
    path, content = f"{store.root}/object", content_of(BIG)
    if upwards:
        store.line.fail(kind, upwards=True, after=BIG // 2, times=2)
    storage.write_bytes(path, content)
    if not upwards:
        store.line.fail(kind, upwards=False, after=BIG // 2, times=2)
    assert storage.read_bytes(path) == content
    assert store.line.met == 2
    assert keys(store) == {"first": 18, "object": BIG}


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")],
)
def test_a_busy_store_is_asked_again(store, status, code):
    def busy():
        store.line.fail("answer", status=status, code=code, times=2)

    path = f"{store.root}/object"
    for act, wanted in [
        (lambda: storage.write_bytes(path, b"12"), None),
        (lambda: storage.read_bytes(path), b"12"),
        (lambda: storage.exists(path), True),
        (lambda: storage.sizes(store.root), {"first": 18, "object": 2}),
        (lambda: storage.glob(f"{store.root}/ob*"), [path]),
        (lambda: storage.children(store.root, "ob*"), [path]),
        (lambda: storage.read_range(path, 1, 2), b"2"),
        (lambda: b"".join(storage.chunks(path)), b"12"),
        (lambda: storage.write_bytes(f"{store.root}/new", b"3"), None),
        (lambda: storage.remove(f"{store.root}/new"), None),
        (lambda: storage.remove_all([path, f"{store.root}/none"]), None),
    ]:
        busy()
        assert act() == wanted
        assert not store.line.faults
    assert store.line.met == 22
    assert keys(store) == {"first": 18}


def test_a_folder_is_never_empty_because_the_store_is_busy(store, monkeypatch):
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "0.5")
    store.line.fail("answer", times=-1)
    for act in (storage.exists, storage.sizes, storage.children, storage.glob):
        with pytest.raises(
            UserError, match=r"answers (SlowDown|503) .*, for 0\.5 s; see that the server"
        ):
            act(f"{store.root}/first/*" if act is storage.glob else store.root)


def test_a_server_that_hangs_is_given_up(store, monkeypatch):
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "1")
    store.line.fail("swallow", times=-1)
    began = time.monotonic()
    with pytest.raises(UserError, match="no answer in time, for 1 s"):
        storage.write_bytes(f"{store.root}/object", b"1")
    assert time.monotonic() - began < 10  # 1.5 s; the last attempt begins at the end of patience
    store.line.clear()
    assert keys(store) == {"first": 18}


def test_a_server_that_hangs_once_is_not_noticed(store):
    store.line.fail("swallow", times=1)
    storage.write_bytes(f"{store.root}/object", b"12")
    assert storage.read_bytes(f"{store.root}/object") == b"12"


def test_a_server_stops_in_a_write_and_comes_back(store):
    path, content = f"{store.root}/object", content_of(BIG)
    store.line.fail("swallow", after=BIG // 2)  # the write stands still in its middle
    with ThreadPoolExecutor(1) as other:
        write = other.submit(storage.write_bytes, path, content)
        while not store.line.met:
            time.sleep(0.01)
        store.stop()
        time.sleep(1)
        assert not write.done()
        store.start()
        write.result()
    assert keys(store) == {"first": 18, "object": BIG}
    assert storage.read_bytes(path) == content


def test_a_server_that_is_gone_is_told_and_leaves_nothing(store, monkeypatch):
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "2")
    path, content = f"{store.root}/object", content_of(BIG)
    storage.write_bytes(path, b"old")
    store.line.fail("swallow", after=BIG // 2)
    with ThreadPoolExecutor(1) as other:
        began = time.monotonic()
        write = other.submit(storage.write_bytes, path, content)
        while not store.line.met:
            time.sleep(0.01)
        store.stop()
        with pytest.raises(UserError, match=rf"{path}: .*{store.url}.* for 2 s; see .* is up"):
            write.result()
        assert time.monotonic() - began < 10
    store.start()
    assert keys(store) == {"first": 18, "object": 3}
    assert storage.read_bytes(path) == b"old"


def test_many_workers_and_a_bad_line(store):
    def work(number):
        path = f"{store.root}/{number:03d}"
        storage.write_bytes(path, content_of(100_000, number))
        return storage.read_bytes(path) == content_of(100_000, number)

    for number in range(12):
        store.line.fail("cut", upwards=number % 2 == 0, after=150_000)
    with ThreadPoolExecutor(8) as workers:
        assert all(workers.map(work, range(32)))
    assert store.line.met == 12
    assert keys(store) == {"first": 18} | {f"{number:03d}": 100_000 for number in range(32)}


def test_many_objects_are_removed_by_few_requests(store, monkeypatch):
    paths = [f"{store.root}/b [1]/{number:02d} ü" for number in range(7)]
    for path in paths[:-1]:
        storage.write_bytes(path, b"1")
    monkeypatch.setattr(objects, "MOST_REMOVED", 3)
    store.line.clear()
    store.line.fail("cut", upwards=False)  # it is done, and the answer lost
    storage.remove_all(paths)
    assert store.line.met == 1
    assert len(store.line.requests) == 4
    assert keys(store) == {"first": 18}


@pytest.mark.parametrize(("code", "passes"), [("InternalError", True), ("AccessDenied", False)])
def test_an_object_that_is_not_removed_is_told(store, monkeypatch, code, passes):
    paths = [f"{store.root}/{number}" for number in range(2)]
    for path in paths:
        storage.write_bytes(path, b"1")
    call, asked = S3FileSystem.call_s3, []

    def refuse(fs, method, **more):
        asked.append(method)
        if method == "delete_objects" and len(asked) == 1:
            return {"Errors": [{"Key": "1", "Code": code, "Message": "so"}]}  # of moto, none
        return call(fs, method, **more)

    monkeypatch.setattr(S3FileSystem, "call_s3", refuse)
    if passes:
        storage.remove_all(paths)
        assert keys(store) == {"first": 18}
    else:
        quick(lambda: storage.remove_all(paths), r"answers AccessDenied \(so\); check the path")


def test_many_threads_begin_with_one_session(store, monkeypatch):
    made = retry._open_session
    opened = []
    monkeypatch.setattr(retry, "_open_session", lambda: opened.append(made()) or opened[-1])
    storage.write_table(f"{store.root}/part", pa.table({"row": [1]}, metadata={"facts": "{}"}))
    retry._session.clear()
    store.line.clear()
    opened.clear()
    with ThreadPoolExecutor(16) as workers:
        found = list(workers.map(storage.read_metadata, [f"{store.root}/part"] * 64))
    assert found == [{b"facts": b"{}"}] * 64
    assert len(opened) == 1
    assert len(store.line.requests) == 64


def quick(act, match):
    """It fails at once, with a sentence."""
    began = time.monotonic()
    with pytest.raises(UserError, match=match):
        act()
    assert time.monotonic() - began < 15


def test_what_waiting_does_not_cure_is_told_at_once(store, monkeypatch):
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "30")
    path = f"{store.root}/object"
    quick(lambda: storage.read_bytes(path), "object does not exist; check")
    quick(lambda: storage.read_rows(path, [0]), "object does not exist; check")
    quick(lambda: storage.read_bytes("s3://no-such-one/a"), "NoSuchBucket .*; check the path")
    quick(lambda: storage.write_bytes("s3://no-such-one/a", b""), "NoSuchBucket .*; check the path")
    quick(lambda: storage.write_bytes("s3://A b/a", b""), "bucket name.*; check the path")
    for code in ("AccessDenied", "InvalidAccessKeyId", "ExpiredToken", "SomethingElse"):
        store.line.fail("answer", status=403, code=code)
        told = rf"{path}: the store answers {code} \(so\); check the path, the credentials"
        quick(lambda: storage.write_bytes(path, b"1"), told)
        store.line.fail("answer", status=403, code=code)
        quick(lambda: storage.exists(path), r"answers 403 \(Forbidden\)")  # HEAD has no body
    assert set(keys(store)) == {"first"}  # nothing that was refused is there
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:1")
    quick(lambda: storage.exists(path), "Invalid endpoint: 127.0.0.1:1; check .*AWS_ENDPOINT_URL")
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "soon")
    quick(lambda: storage.exists(path), "PATIENCE_S=soon: give seconds")


def test_without_credentials(store, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    with pytest.raises(UserError, match=r"locate credentials; .*AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"{store.root}/first")
