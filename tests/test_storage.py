"""Files and objects: whole or absent, named and digested wherever they lie."""

import hashlib
import json

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
    assert [len(piece) for piece in storage.pieces(str(path))] == [1 << 22, 1 << 22]


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
