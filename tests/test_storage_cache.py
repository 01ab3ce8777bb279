import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from raylarge.errors import MissingResource
from raylarge.storage import cache


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLARGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAYLARGE_CACHE_BYTES", "1000")
    return tmp_path / "cache"


def filler(size, made=None):
    def make(folder):
        (folder / "slide").write_bytes(b"x" * size)
        if made is not None:
            made.append(size)

    return make


def hold(identity, size=300, made=None):
    return cache.acquire(identity, size, filler(size, made), "slide")


def names(root):
    return sorted(path.name for path in root.iterdir() if path.name != ".room")


def test_an_entry_is_made_once_and_held_until_closed(root):
    made = []
    first, second = hold("a", made=made), hold("a", made=made)
    assert (first.path, made) == (second.path, [300])
    assert Path(first.path).read_bytes() == b"x" * 300
    for held in (first, second, second):
        held.close()
    assert hold("b").path != first.path


def test_the_least_recently_used_entry_goes_first(root):
    for name in "abc":
        hold(name).close()
        time.sleep(0.02)
    hold("a").close()
    made = []
    hold("d").close()
    for name in "acd":
        hold(name, made=made).close()
    assert made == []
    hold("b", made=made).close()
    assert made == [300]
    assert sum(path.stat().st_size for path in root.glob("*.lock")) <= 1000


def test_an_entry_in_use_is_never_evicted(root, monkeypatch):
    monkeypatch.setattr(cache, "POLL_S", 0.01)
    monkeypatch.setattr(cache, "WAIT_S", 0.1)
    held = [hold(name) for name in "abc"]
    with pytest.raises(
        MissingResource,
        match=r"needs up to 300 bytes .* may hold 1,000 and had 900 in use for 0\.1 s; "
        "set RAYLARGE_CACHE_BYTES= higher",
    ):
        hold("d")
    assert all(os.path.exists(one.path) for one in held)
    held.pop(0).close()
    hold("d").close()
    assert all(os.path.exists(one.path) for one in held)


def test_who_needs_room_waits_until_another_lets_go(root, monkeypatch, caplog):
    monkeypatch.setattr(cache, "POLL_S", 0.01)
    held = [hold(name) for name in "abc"]
    letting_go = threading.Timer(0.4, held[1].close)
    letting_go.start()
    late = hold("d")
    assert letting_go.finished.is_set()
    assert [os.path.exists(one.path) for one in (*held, late)] == [True, False, True, True]
    assert len([one for one in caplog.records if "waiting for room" in one.message]) == 1


def test_others_go_on_while_one_waits_for_room(root, monkeypatch):
    monkeypatch.setattr(cache, "POLL_S", 0.01)
    held = [hold("a", 600), hold("b", 200)]
    waiting = threading.Thread(target=lambda: held.append(hold("c", 500)))
    waiting.start()
    time.sleep(0.1)
    hold("d", 100).close()
    assert waiting.is_alive()
    held[0].close()
    waiting.join(10)
    assert [os.path.getsize(one.path) for one in held[1:]] == [200, 500]


def test_what_never_fits_is_refused_at_once(root):
    with pytest.raises(
        MissingResource, match=r"needs up to 1,001 bytes .* may hold 1,000; set RAYLARGE_CAC"
    ):
        hold("e", 1001)


def test_what_fails_leaves_nothing(root):
    def fail(folder):
        (folder / "half").write_bytes(b"x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.acquire("a", 300, fail, "slide")
    assert [name for name in names(root) if not name.endswith(".lock")] == []
    assert [path.stat().st_size for path in root.glob("*.lock")] == [0]
    hold("a").close()


def test_what_a_killed_process_left_is_taken_away(root):
    code = """
import os, signal
from raylarge.storage import cache
def make(folder):
    (folder / "half").write_bytes(b"x" * 100)
    os.kill(os.getpid(), signal.SIGKILL)
cache.acquire("a", 900, make, "slide")
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert any(name.endswith(".part") for name in names(root))
    for name in "bcd":
        hold(name).close()
    assert not any(name.endswith(".part") for name in names(root))


def test_what_somebody_tidied_away_is_made_again(root):
    held = hold("a")
    held.close()
    os.unlink(held.path)
    made = []
    hold("a", made=made).close()
    assert (made, os.path.getsize(held.path)) == ([300], 300)


def test_a_full_disk_is_one_sentence(root):
    code = """
import resource
from raylarge.storage import cache
from raylarge.slides.protocol import user_errors
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with user_errors("s.svs"):
        cache.acquire("a", 900, lambda folder: (folder / "slide").write_bytes(b"x" * 9000), "slide")
except Exception as error: print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(
        "UserError slide s.svs: the file does not fit on the disk of the cache "
    )
    assert "set RAYLARGE_CACHE= to a folder on a larger disk" in done.stdout
    assert [name for name in names(root) if not name.endswith(".lock")] == []


def test_settings_that_make_no_sense_are_refused(root, monkeypatch):
    monkeypatch.setenv("RAYLARGE_CACHE_BYTES", "64GB")
    with pytest.raises(MissingResource, match="RAYLARGE_CACHE_BYTES=64GB is no number of bytes"):
        hold("a")
    (root / "file").write_bytes(b"")
    monkeypatch.setenv("RAYLARGE_CACHE", str(root / "file" / "below"))
    with pytest.raises(MissingResource, match=r"file/below cannot be made .* set RAYLARGE_CACHE="):
        hold("a")


def test_the_default_folder_is_closed_to_others(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYLARGE_CACHE")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = cache.folder()
    assert (root.parent, root.stat().st_mode & 0o777) == (tmp_path, 0o700)
    assert cache.folder() == root
    for mode in (0o755, 0o701, 0o770):
        root.chmod(mode)
        with pytest.raises(
            MissingResource, match=rf"no folder of yours .* mode {mode:o}\); remove it, or"
        ):
            cache.folder()
    root.chmod(0o700)
    root.rename(tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MissingResource, match="no folder of yours that is closed to others"):
        cache.folder()
    monkeypatch.setenv("RAYLARGE_CACHE", str(root))
    assert cache.folder() == root  # who names it answers for it


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_default_folder_of_another_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("RAYLARGE_CACHE")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.chown(cache.folder(), 65534, 65534)
    with pytest.raises(MissingResource, match=r"owner 65534, mode 700\); .* set RAYLARGE_CACHE="):
        cache.folder()


def busy(number):
    """One of several processes that share a cache too small for all of their entries."""
    for turn in range(25):
        name = str((number + turn) % 7)
        held = cache.acquire(name, 100, lambda folder, n=name: _slowly(folder, n), "slide")
        assert Path(held.path).read_text() == name * 100
        time.sleep(0.002)
        assert Path(held.path).read_text() == name * 100
        held.close()
    return True


def _slowly(folder, name):
    (folder / "slide").write_text(name * 50)
    time.sleep(0.003)
    (folder / "slide").write_text(name * 100)


def test_processes_share_it_without_ever_seeing_half_an_entry(root, monkeypatch):
    monkeypatch.setenv("RAYLARGE_CACHE_BYTES", "500")
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert all(pool.map(busy, range(4)))
    assert sum(path.stat().st_size for path in root.glob("*/slide")) <= 500
