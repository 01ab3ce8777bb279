"""One command at a time in a folder: real processes, a real server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from raylarge import storage
from raylarge.errors import UserError
from raylarge.storage import lock

HOLD = """
import sys, time
from raylarge import storage
with storage.exclusive(sys.argv[1], "prepare"):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def enter(folder):
    with storage.exclusive(folder, "prepare"):
        pass


@pytest.fixture
def holder():
    """Starts processes that hold a folder until a line comes, and ends them."""
    started = []

    def start(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request, tmp_path):
    if request.param == "disk":
        return f"{tmp_path}/data"
    return f"{request.getfixturevalue('s3_bucket')}/locks/{tmp_path.name}"


def test_a_second_command_is_refused_until_the_first_has_ended(folder, holder):
    first = holder(folder)
    with pytest.raises(UserError) as refused, storage.exclusive(folder, "sample"):
        pass
    text = str(refused.value)
    assert f"{folder} is in use: prepare has been writing to it since 20" in text
    assert f"process {first.pid} on " in text
    assert "give another out=" in text
    first.communicate(b"\n")
    assert first.returncode == 0
    with storage.exclusive(folder, "sample") as check:
        check()
    assert not storage.exists(f"{folder}/.lock")


def test_a_killed_command_leaves_the_folder_free(folder, holder):
    first = holder(folder)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert storage.exists(f"{folder}/.lock")
    with storage.exclusive(folder, "prepare"):
        assert storage.read_json(f"{folder}/.lock")["process"] == os.getpid()
    assert not storage.exists(f"{folder}/.lock")


def test_of_many_that_begin_at_once_one_is_let_in(folder):
    start, end = threading.Barrier(8), threading.Event()

    def enter(_):
        start.wait()
        try:
            with storage.exclusive(folder, "prepare"):
                end.wait(20)
                return 1
        except UserError:
            refused.append(1)
            if len(refused) == 7:
                end.set()
            return 0

    refused = []
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(enter, range(8))) == 1
    assert len(refused) == 7


def test_an_empty_folder_of_a_refused_command_does_not_stay(tmp_path):
    with storage.exclusive(f"{tmp_path}/new", "prepare"):
        assert os.listdir(f"{tmp_path}/new") == [".lock"]
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with storage.exclusive(f"{tmp_path}/old", "prepare"):
        pass
    assert (tmp_path / "old").exists()


def test_a_folder_that_cannot_be_created_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"/proc/nope"):
        enter("/proc/nope")
    (tmp_path / "file").write_text("")
    place = f"{tmp_path}/file"
    with pytest.raises(UserError, match=r"/file: .*choose another path"):
        enter(place)


def foreign(folder, **more):
    """A lease of another machine."""
    lease = {"purpose": "prepare", "host": "far", "machine": "far", "process": 1, "token": "x"}
    storage.write_json(f"{folder}/.lock", {**lease, **more})


@pytest.mark.s3
def test_a_lease_of_another_machine_counts_while_it_is_renewed(s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_S", 0.2)
    folder = f"{s3_bucket}/locks/{tmp_path.name}"
    foreign(folder, renewed=time.time())
    with pytest.raises(UserError, match=r"on far.*wait 60 s or remove s3://.*/\.lock"):
        enter(folder)
    foreign(folder, renewed=time.time() - 61)  # two looks agree: nobody renews it
    with storage.exclusive(folder, "prepare"):
        assert storage.read_json(f"{folder}/.lock")["process"] == os.getpid()
    foreign(folder, renewed=time.time() - 100)  # its clock is behind, but it renews
    monkeypatch.setattr(time, "sleep", lambda _: foreign(folder, renewed=time.time() - 99))
    with pytest.raises(UserError, match="in use"):
        enter(folder)


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def lose(folder):
    """Enter a folder, see the lease renewed, and have it taken over."""
    with storage.exclusive(folder, "prepare") as check:
        before = storage.read_json(f"{folder}/.lock")["renewed"]
        wait_for(lambda: storage.read_json(f"{folder}/.lock")["renewed"] > before)
        check()
        foreign(folder, renewed=time.time())
        wait_for(lambda: lost(check))


def lost(check):
    try:
        check()
    except UserError:
        return True
    return False


@pytest.mark.s3
def test_a_lease_is_renewed_and_its_loss_is_noticed(s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    folder = f"{s3_bucket}/locks/{tmp_path.name}"
    with pytest.raises(UserError, match="another command has taken over"):
        lose(folder)
    assert storage.read_json(f"{folder}/.lock")["host"] == "far"  # it is not ours to remove


@pytest.mark.s3
def test_a_lease_that_could_not_be_removed_keeps_its_own_process_out_no_longer(
    s3_bucket, tmp_path, monkeypatch
):
    folder = f"{s3_bucket}/locks/{tmp_path.name}"
    with monkeypatch.context() as away:
        away.setattr(lock.objects, "remove", lambda paths: None)  # the store does not answer
        enter(folder)
    assert storage.exists(f"{folder}/.lock")
    with storage.exclusive(folder, "prepare"), pytest.raises(lock.InUse):
        enter(folder)  # a block of this process still runs
    assert not storage.exists(f"{folder}/.lock")


def test_a_damaged_lock_file_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text('{"purpose": ')
    with storage.exclusive(str(tmp_path), "prepare"):
        assert json.loads((tmp_path / ".lock").read_text())["purpose"] == "prepare"
