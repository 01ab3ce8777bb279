"""Files and objects: whole or absent, named and digested wherever they lie."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylarge import storage
from raylarge.errors import UserError


def folder_of(root, files):
    root.mkdir()
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"{} {}"])
def test_a_document_that_is_no_json_is_named(tmp_path, content):
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"facts\.json is not readable as JSON .*copy it again"):
        storage.read_json(str(path))


def test_json_holds_null_where_a_number_is_not_finite(tmp_path):
    path = str(tmp_path / "report.json")
    nan, inf = float("nan"), float("inf")
    storage.write_json(path, {"a": [1.5, nan, (inf, -inf)], "b": {"c": nan, "d": "NaN"}, "e": 1})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    document = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert document == {"a": [1.5, None, [None, None]], "b": {"c": None, "d": "NaN"}, "e": 1}
    assert storage.as_json({"b": nan, "a": 1}) == '{"a": 1, "b": null}'


def test_numbers_that_older_versions_wrote_into_json_are_read_as_null(tmp_path):
    (tmp_path / "a.json").write_text('{"a": NaN, "b": [Infinity, -Infinity, 2.5]}')
    document = storage.read_json(str(tmp_path / "a.json"))
    assert document == {"a": None, "b": [None, None, 2.5]}


def test_sizes_know_folders_of_any_name_and_files_behind_links(tmp_path):
    made = folder_of(tmp_path / "b [1]*", {"one": b"123", ".two": b""})
    (made / "below").mkdir()
    (made / "three").symlink_to(made / "one")  # as in the hub's cache
    assert storage.sizes(f"{made}/") == {"one": 3, ".two": 0, "three": 3}


def test_a_digest_is_the_same_in_pieces(tmp_path):
    content = b"0123456789abcdef" * (1 << 19)  # two pieces
    path = tmp_path / "large"
    path.write_bytes(content)
    wanted = hashlib.sha256(content).hexdigest()[:16]
    assert storage.digest_file(path) == storage.digest(content[:7], content[7:]) == wanted
    assert [len(piece) for piece in storage.chunks(str(path))] == [1 << 22, 1 << 22]


def test_a_folder_takes_the_place_of_another_and_of_what_was_left(tmp_path):
    target = folder_of(tmp_path / "vae", {"old": b"1"})
    folder_of(tmp_path / ".vae.0123abcd", {"left": b"1"})
    folder_of(tmp_path / ".vae.kept", {"mine": b"1"})
    storage.put_folder(folder_of(tmp_path / "made", {"new": b"2"}), str(target))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".vae.kept", "vae"]
    assert storage.sizes(str(target)) == {"new": 1}


@pytest.mark.s3
def test_a_folder_in_s3_loses_what_the_new_one_does_not_have(tmp_path, s3_bucket):
    target = f"{s3_bucket}/storage/part [1]"
    many = {"config.json": b"{}", "a.safetensors": b"1", "a.index.json": b"{}"}
    storage.put_folder(folder_of(tmp_path / "one", many), target)
    few = {"config.json": json.dumps({"x": 1}).encode(), "b.safetensors": b"12"}
    storage.put_folder(folder_of(tmp_path / "two", few), target)
    assert storage.sizes(f"{target}/") == {"config.json": 8, "b.safetensors": 2}
    assert storage.read_json(storage.join(target, "config.json")) == {"x": 1}


def test_a_pattern_and_a_folder_with_brackets(tmp_path):
    for folder in ("b [1]", "b 1"):
        folder_of(tmp_path / folder, {"one.parquet": b"1", "two.json": b"2", ".one.parquet.x": b""})
    (tmp_path / "b [1]" / "below").mkdir()
    (tmp_path / "b [1]" / "below" / "three.parquet").write_bytes(b"3")
    root = f"{tmp_path}/b [1]"
    assert storage.children(root, "*.parquet") == [f"{root}/one.parquet"]
    assert storage.children(f"{root}/", "t*") == [f"{root}/two.json"]
    assert storage.children(f"{root}/none") == []
    assert storage.glob(f"{root}/*.parquet") == [f"{root}/one.parquet"]
    assert storage.glob(f"{root}/one.parquet") == [f"{root}/one.parquet"]
    assert storage.glob(f"{root}/one.p") == []
    (tmp_path / "b [1]").rename(tmp_path / "c")
    assert storage.glob(f"{root}/*.parquet") == [f"{tmp_path}/b 1/one.parquet"]
    both = [f"{tmp_path}/b 1/two.json", f"{tmp_path}/c/two.json"]
    assert storage.glob(f"{tmp_path}/*/t?o.json") == both
    assert storage.glob(f"{tmp_path}/**/two.json") == both
    assert storage.glob(f"{tmp_path}/c/**/*.parquet") == [
        f"{tmp_path}/c/below/three.parquet",
        f"{tmp_path}/c/one.parquet",
    ]
    assert f"{tmp_path}/c/below/three.parquet" in storage.glob(f"{tmp_path}/**")
    assert storage.glob(f"{tmp_path}/c/two.json/*") == []


@pytest.mark.parametrize(
    "end", ["*", "*.bin", "?.bin", "[ab].bin", "*/a.bin", "**", "**/a.bin", "d"]
)
def test_a_listing_is_what_glob_finds(tmp_path, end):
    for folder in ("d", "d/e", "f"):
        folder_of(tmp_path / folder, {"a.bin": b"", "bb.bin": b"", ".c": b""})
    found, wanted = storage.glob(f"{tmp_path}/{end}"), fsspec.filesystem("file").glob
    assert set(found) == {path.rstrip("/") for path in wanted(f"{tmp_path}/{end}")} - {
        str(tmp_path)
    }


def test_files_that_come_and_go_do_not_disturb_a_listing(tmp_path):
    (tmp_path / "stays").write_bytes(b"1")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    on = threading.Event()

    def disturb():
        while not on.is_set():
            storage.write_bytes(f"{tmp_path}/comes", b"1")
            storage.remove(f"{tmp_path}/comes")

    other = threading.Thread(target=disturb)
    other.start()
    seen = [storage.sizes(str(tmp_path)) for _ in range(300)]
    on.set()
    other.join()
    assert all(one["stays"] == 1 for one in seen)


def test_files_are_removed_as_far_as_they_are_there(tmp_path):
    folder_of(tmp_path / "b [1]", {"one": b"1", "two": b"2", "three": b"3"})
    root = f"{tmp_path}/b [1]"
    storage.remove_all(f"{root}/{name}" for name in ("one", "three", "four"))
    storage.remove(f"{root}/none/five")
    storage.remove_all([])
    assert storage.sizes(root) == {"two": 1}


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB."""
    if shutil.which("mount") is None or os.getuid() != 0:
        pytest.skip("only root may mount a small disk")
    made = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(made, capture_output=True).returncode:
        pytest.skip("here even root may not mount a small disk")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk(small_disk):
    path = f"{small_disk}/part.parquet"
    storage.write_bytes(path, b"old")
    with pytest.raises(UserError, match=rf"{path}: No space left on device; make room"):
        storage.write_bytes(path, bytes(2 << 20))
    assert storage.sizes(str(small_disk)) == {"part.parquet": 3}
    assert storage.read_bytes(path) == b"old"
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"Read-only file system; .*choose another path"):
        storage.write_bytes(path, b"new")


# In a process of its own: limits and rights that are given away do not come back.
REFUSED = """
import os, resource, sys
from raylarge import storage
from raylarge.errors import UserError
root = sys.argv[1]
def told(act):
    try: act()
    except UserError as error: print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
told(lambda: storage.write_bytes(f"{root}/open/large", bytes(2000)))
print(os.listdir(f"{root}/open"))
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
told(lambda: storage.write_bytes(f"{root}/closed/one", b"1"))
told(lambda: storage.remove(f"{root}/closed/secret"))
told(lambda: storage.write_bytes(f"{root}/closed/new/one", b"1"))
told(lambda: storage.read_bytes(f"{root}/closed/secret"))
told(lambda: storage.glob(f"{root}/hidden/*"))
"""


def test_what_a_disk_refuses(tmp_path):
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:  # pytest's own: others may pass through
        parent.chmod(0o755)
    folder_of(tmp_path / "open", {})
    folder_of(tmp_path / "closed", {"secret": b"1"})
    folder_of(tmp_path / "hidden", {"secret": b"1"})
    (tmp_path / "closed" / "secret").chmod(0o000)
    (tmp_path / "closed").chmod(0o555)
    (tmp_path / "hidden").chmod(0o311)
    command = [sys.executable, "-c", REFUSED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.getcwd())
    large, left, *denied = done.stdout.splitlines()
    assert large.startswith(f"{tmp_path}/open/large: File too large; ")
    assert left == "[]"
    assert len(denied) == 5, done.stderr
    assert all(": Permission denied; make room, change the rights" in line for line in denied)


def test_a_file_in_the_way_of_a_folder(tmp_path):
    storage.write_bytes(f"{tmp_path}/file", b"1")
    for path in (f"{tmp_path}/file/one", f"{tmp_path}/file/deep/one"):
        with pytest.raises(UserError, match=rf"{path}: (Not a directory|File exists); "):
            storage.write_bytes(path, b"1")
        assert not storage.exists(path)
    for act in (storage.read_bytes, lambda path: storage.write_bytes(path, b"")):
        with pytest.raises(UserError, match=rf"{tmp_path}: Is a directory; .*choose another path"):
            act(str(tmp_path))
    with pytest.raises(UserError, match="File name too long"):
        storage.write_bytes(f"{tmp_path}/{'x' * 250}", b"")
    with pytest.raises(UserError, match="cannot be opened"):
        storage.read_bytes("nowhere://a/b")


def table_of(rows):
    images = [bytes([row % 256]) * (row % 50) for row in range(rows)]
    return pa.table(
        {"row": pa.array(range(rows), pa.int32()), "image": images},
        schema=pa.schema([("row", pa.int32()), ("image", pa.binary())], {"facts": "{}"}),
    )


def test_row_groups_are_those_that_were_asked_for(tmp_path):
    path, table = f"{tmp_path}/part.parquet", table_of(1000)
    storage.write_table(path, table, [300, 1, 699])
    found = pq.ParquetFile(path).metadata
    assert [found.row_group(group).num_rows for group in range(3)] == [300, 1, 699]
    assert storage.read_table(path).equals(table, check_metadata=True)
    assert storage.read_rows(path, [2, 1]).equals(
        pa.concat_tables([table.slice(301), table.slice(300, 1)]), check_metadata=True
    )
    assert storage.read_rows(path, [1], ["image", "row"]).column_names == ["image", "row"]
    assert storage.read_rows(path, []).num_rows == 0
    assert storage.read_metadata(path) == {b"facts": b"{}"}
    for groups in ([300, 1], [0, 1000], [-1, 1001], []):
        with pytest.raises(ValueError, match="do not make up 1000 rows"):
            storage.write_table(path, table, groups)
    storage.write_table(path, table.slice(0, 0), [])
    assert storage.read_table(path).schema == table.schema
    with pytest.raises(UserError, match=r"part\.parquet has 0 row groups and no number 0; run"):
        storage.read_rows(path, [0])
    for read in (lambda: storage.read_table(path, ["x"]), lambda: storage.read_rows(path, [], "x")):
        with pytest.raises(UserError, match=r"part\.parquet has no column x; run what wrote it"):
            read()
    with pytest.raises(UserError, match=r"none\.parquet does not exist; check the path"):
        storage.read_metadata(f"{tmp_path}/none.parquet")


@pytest.mark.parametrize("groups", [None, [123, 877]])
def test_the_same_table_makes_the_same_bytes(tmp_path, groups):
    table = table_of(1000)
    cut = pa.concat_tables([table.slice(0, 7), table.slice(7, 500), table.slice(507)])
    again = pa.concat_tables([table_of(1500).slice(0, 1000)])
    names = [f"{tmp_path}/{name}.parquet" for name in "abc"]
    for name, one in zip(names, (table, cut, again), strict=True):
        storage.write_table(name, one, groups)
    assert len({storage.read_bytes(name) for name in names}) == 1


def test_images_stay_as_they_are_and_dictionaries_hold_words_alone(tmp_path):
    path, labels = f"{tmp_path}/part.parquet", pa.map_(pa.string(), pa.string())
    table = table_of(9).append_column("site", [["a"] * 9])
    table = table.append_column("labels", pa.array([[("grade", "1")]] * 9, labels))
    storage.write_table(path, table.append_column("grid", [[[0.5, 0.5]] * 9]))
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    plain = [one.path_in_schema for one in columns if one.compression == "UNCOMPRESSED"]
    assert plain == ["image"]
    words = [one.path_in_schema for one in columns if one.has_dictionary_page]
    assert words == ["site", "labels.key_value.key", "labels.key_value.value"]


def test_metadata_of_any_size(tmp_path):
    path, large = f"{tmp_path}/part.parquet", {"facts": "x" * 100_000}
    storage.write_table(path, table_of(9).replace_schema_metadata(large))
    assert storage.read_metadata(path) == {b"facts": b"x" * 100_000}
    whole = storage.read_bytes(path)
    for content in (b"", b"PAR1", whole[:-1], whole[-90_000:]):
        storage.write_bytes(path, content)
        with pytest.raises(UserError, match=r"part\.parquet is no parquet file that can be read"):
            storage.read_metadata(path)


def test_no_damage_to_a_table_is_taken_for_a_value(tmp_path):
    path, table = f"{tmp_path}/part.parquet", table_of(500)
    storage.write_table(path, table, [200, 300])
    whole, random = storage.read_bytes(path), np.random.default_rng(0)
    cuts = [whole[:size] for size in (0, 3, 100, len(whole) - 1)]
    pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for at in random.integers(4, pages, 60):
        cuts.append(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
    told = []
    for content in cuts:
        storage.write_bytes(path, content)
        for read in (storage.read_table, lambda path: storage.read_rows(path, [0, 1])):
            try:
                assert read(path).equals(table)  # a flipped bit may not matter
            except UserError as error:
                told.append(str(error))
    assert len(told) > len(cuts)
    assert all(f"{path} is no parquet file that can be read" in one for one in told)
