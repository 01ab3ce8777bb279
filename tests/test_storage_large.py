"""Large objects in S3: sent in parts, read by ranges, over a line that breaks."""

import pyarrow as pa
import pytest
import servers
from servers import content_of, keys, uploads

from raylarge import storage
from raylarge.errors import UserError
from raylarge.storage import objects

machine, store = servers.machine, servers.store  # fixtures
pytestmark = pytest.mark.s3


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)  # the smallest that S3 allows


def test_a_large_object_survives_its_parts(store, in_parts, tmp_path):
    path, content = f"{store.root}/object", content_of(11 << 20)
    for after in (2, 3, 4):
        store.line.fail("cut", after=after << 20)
    storage.write_bytes(path, content)
    for after in (2, 3, 4):
        store.line.fail("cut", upwards=False, after=after << 20)
    assert storage.read_bytes(path) == content
    assert store.line.met == 6
    assert storage.read_range(path, 6 << 20, (6 << 20) + 9) == content[6 << 20 :][:9]
    assert b"".join(storage.chunks(path)) == content
    assert uploads(store) == []
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model.bin").write_bytes(content)
    storage.put_folder(tmp_path / "made", store.root)
    assert keys(store) == {"model.bin": 11 << 20}
    assert storage.read_bytes(f"{store.root}/model.bin") == content


def test_a_large_object_that_fails_is_taken_back(store, in_parts, monkeypatch):
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "0.5")
    left = []

    def refuse(fs, root, method, **more):
        if method == "upload_part" and more["PartNumber"] == 3:
            left.extend(uploads(store))
            raise OSError("no")
        return call(fs, root, method, **more)

    call = objects._call
    monkeypatch.setattr(objects, "_call", refuse)
    with pytest.raises(UserError, match=r"object: no, for 0\.5 s"):
        storage.write_bytes(f"{store.root}/object", content_of(11 << 20))
    assert left
    assert uploads(store) == []
    assert keys(store) == {"first": 18}


def test_parts_that_a_server_forgot_are_sent_again(store, in_parts, monkeypatch):
    def forget(fs, root, method, **more):
        if method == "complete_multipart_upload" and not forgotten:
            forgotten.append(call(fs, root, "abort_multipart_upload", UploadId=more["UploadId"]))
            raise FileNotFoundError("NoSuchUpload")  # as S3 says it; moto answers 500
        return call(fs, root, method, **more)

    forgotten = []
    call = objects._call
    monkeypatch.setattr(objects, "_call", forget)
    path, content = f"{store.root}/object", content_of(11 << 20)
    storage.write_bytes(path, b"old")
    storage.write_bytes(path, content)
    assert forgotten
    assert storage.read_bytes(path) == content
    assert uploads(store) == []


def lose_answers(monkeypatch, method, error):
    """Do what is asked, but an error arrives instead of the first answer."""

    def lose(fs, root, asked, **more):
        answer = call(fs, root, asked, **more)
        if asked == method and not lost:
            lost.append(asked)
            raise error
        return answer

    lost = []
    call = objects._call
    monkeypatch.setattr(objects, "_call", lose)
    return lost


@pytest.mark.parametrize("error", [ConnectionResetError("lost"), FileNotFoundError("NoSuchUpload")])
def test_whoever_loses_the_answer_puts_again(store, in_parts, monkeypatch, error):
    # S3's answers after the first answer got lost: none at first, or that the upload is over.
    lost = lose_answers(monkeypatch, "complete_multipart_upload", error)
    path, content = f"{store.root}/object", content_of(11 << 20)
    storage.write_bytes(path, content)
    assert lost
    assert storage.read_bytes(path) == content
    assert uploads(store) == []
    assert keys(store) == {"first": 18, "object": 11 << 20}


def test_row_groups_are_read_by_ranges(store, monkeypatch):
    path = f"{store.root}/part.parquet"
    rows = [content_of(1000, number) for number in range(1000)]
    table = pa.table({"row": range(1000), "image": rows})
    storage.write_table(path, table.replace_schema_metadata({"facts": "{}"}), [100] * 10)
    size = keys(store)["part.parquet"]
    read = []

    def seen(start, stop):
        read.append(stop - start)

    store.line.clear()
    store.line.fail("close", upwards=False, after=1000)
    assert storage.read_metadata(path) == {b"facts": b"{}"}
    assert len(store.line.requests) == 2  # one, and one more since its answer was cut
    store.line.clear()
    with pytest.MonkeyPatch.context() as patch:
        whole = objects.read_range
        patch.setattr(objects, "read_range", lambda p, a, b, e: seen(a, b) or whole(p, a, b, e))
        store.line.fail("cut", upwards=False, after=80_000, times=2)
        some = storage.read_rows(path, [7, 2], ["image", "row"])
    assert store.line.met == 2
    assert some["row"].to_pylist() == [*range(700, 800), *range(200, 300)]
    assert some["image"].to_pylist() == rows[700:800] + rows[200:300]
    assert sum(read) < size / 2
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "0.5")
    store.line.fail("cut", upwards=False, after=1000, times=-1)  # after HEAD
    with pytest.raises(UserError, match=r"for 0\.5 s; see"):  # through pyarrow's own threads
        storage.read_rows(path, [1])


def test_an_object_that_is_written_anew_is_read_in_one_version(store, monkeypatch):
    path = f"{store.root}/part.parquet"
    old, new = (pa.table({"row": [number] * 100_000}) for number in (1, 2))
    storage.write_table(path, old)
    whole, times = objects.read_range, []

    def read(*asked):
        answer = whole(*asked)
        if not times:
            storage.write_table(path, new)
        times.append(asked)
        return answer

    monkeypatch.setattr(objects, "read_range", read)
    assert set(storage.read_rows(path, [0])["row"].to_pylist()) == {2}
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    storage.write_bytes(path, content_of(8 << 20))
    stream = storage.chunks(path)
    next(stream)
    storage.write_bytes(path, content_of(8 << 20, 1))
    with pytest.raises(UserError, match="changes while it is read"):
        list(stream)
