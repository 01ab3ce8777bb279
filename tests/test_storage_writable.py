"""Places that cannot be written are a sentence before any work, and a check leaves no trace."""

import importlib
import os
import tempfile

import pytest

from raylarge import storage
from raylarge.errors import UserError

NOBODY = 65534


def test_a_check_leaves_no_trace(tmp_path):
    for folder in ("", "new", "new/deep/folder", "b [1]", "ä ö"):
        storage.require_writable("out", str(tmp_path / folder))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("/proc/nope", "nothing can be created in /proc"),
        ("/proc/1/nope/deeper", "cannot be written"),
        ("/dev/null", "/dev/null is a file, not a folder"),
        ("/dev/null/below", "/dev/null is a file|Not a directory"),
        ("{tmp}/file", "file is a file, not a folder"),
        ("{tmp}/file/below/it", "file is a file|Not a directory"),
        ("{tmp}/dangling", "dangling is a link whose target does not exist"),
        ("{tmp}/" + "x" * 300, "File name too long"),
        ("{tmp}/" + "/".join(["x" * 200] * 30), "File name too long"),
        ("{tmp}/a\0b", "null"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, place, says):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=says) as refused:
        storage.require_writable("out", place.format(tmp=tmp_path))
    assert "choose another folder" in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


def refusal_of_anybody(folder):
    """What a user without rights is told of a folder: a process of its own, as root has all."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        try:
            storage.require_writable("out", folder)
        except UserError as error:
            os.write(sender, str(error).encode())
        finally:
            os._exit(0)
    os.close(sender)
    os.waitpid(child, 0)
    with open(receiver) as stream:
        return stream.read()


def test_a_folder_without_rights_is_one_sentence():
    with tempfile.TemporaryDirectory() as folder:  # that of pytest is closed to other users
        os.chmod(folder, 0o555)
        assert "Permission denied" in refusal_of_anybody(f"{folder}/new")
        os.chmod(folder, 0o777)
        assert refusal_of_anybody(f"{folder}/new") == ""


def test_a_bucket_is_asked_too(s3_bucket):
    storage.require_writable("out", f"{s3_bucket}/new")
    assert storage.entries(f"{s3_bucket}/new") == []
    with pytest.raises(UserError, match="NoSuchBucket"):
        storage.require_writable("out", "s3://there-is-none/new")


@pytest.mark.parametrize(
    "words",
    [
        "prepare slides={slide} preset=tiny out=/proc/nope",
        "sample bundle={bundle} order.size=64 out=/proc/nope",
        "train model=vae preset=tiny data={data} out=/proc/nope",
        "exchange export=trident data={data} out=/proc/nope",
        "import_weights checkpoint={slide} out=/proc/nope",
        "demo slides={slide} out=/proc/nope",
    ],
)
def test_every_job_says_so_at_once(words, tiny_slide, tiny_bundle, small_examples):
    job, *rest = words.format(slide=tiny_slide, bundle=tiny_bundle, data=small_examples).split()
    with pytest.raises(UserError, match="out=/proc/nope cannot be written"):
        importlib.import_module(f"jobs.{job}").main(rest)
