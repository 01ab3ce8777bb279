"""Checkpoints on a disk or in S3: whole or absent, the newest valid one found again.

    ROOT/step-00000200/ <files of every rank>  rank-0.json  rank-1.json  checkpoint.json

Each rank puts its files under deterministic names, every file written beside and renamed (one
PUT on an object store). Rank 0 commits: `checkpoint.json`, which lists all files with their
sizes, comes last. A folder without it, or with a file missing or cut short, does not exist.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from raylarge import storage

COMMIT = "checkpoint.json"
HISTORY = "loss.csv"  # shown beside the checkpoints, too


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, root: str, keep: int) -> None:
        """Take a run's folder, which need not exist yet, and how many checkpoints stay."""
        self.root = root
        self.keep = keep
        self.local = storage.is_local(root)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A local folder to write a rank's files to, on the disk they will stay on."""
        if self.local:
            Path(self.root).mkdir(parents=True, exist_ok=True)
        within = self.root if self.local else None
        with tempfile.TemporaryDirectory(prefix=".beside-", dir=within) as made:
            yield Path(made)

    def put(self, step: int, rank: int, made: Path) -> None:
        """Move a rank's files into the step's folder, and list them there."""
        sizes = {}
        for file in sorted(made.rglob("*")):
            if file.is_file():
                name = file.relative_to(made).as_posix()
                sizes[name] = file.stat().st_size
                self._place(file, self._path(step, name))
        storage.write_json(self._path(step, f"rank-{rank}.json"), sizes)

    def commit(self, step: int, world_size: int, facts: dict[str, Any]) -> None:
        """Declare a step's folder whole, and remove all but the newest ones.

        Raises:
            OSError: a rank's files are not to be seen from here.
        """
        files: dict[str, int] = {}
        for rank in range(world_size):
            listed = self._path(step, f"rank-{rank}.json")
            if not storage.exists(listed):
                raise OSError(
                    f"the files of rank {rank} do not show in {self.root}; all workers must "
                    f"share the storage: give out=s3://... or a shared folder."
                )
            files |= storage.read_json(listed)
        storage.write_json(self._path(step, COMMIT), {**facts, "step": step, "files": files})
        if HISTORY in files:
            history = storage.read_bytes(self._path(step, HISTORY))
            storage.write_bytes(storage.join(self.root, HISTORY), history)
        for old in sorted(self._committed())[: -self.keep]:
            self._remove(old)

    def newest(self) -> int | None:
        """The newest whole checkpoint's step."""
        newest_first = sorted(self._committed(), reverse=True)
        return next((step for step in newest_first if self._whole(step)), None)

    def forget_after(self, step: int) -> None:
        """Remove what crashed runs left: later steps' folders and files written beside."""
        for path in storage.listing(storage.join(self.root, "step-*")):
            if _step(path) > step:
                self._remove(_step(path))
        if self.local:
            for left in Path(self.root).glob(".beside-*"):
                shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def fetch(self, step: int) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A whole checkpoint as a local folder, and the facts it was committed with."""
        facts = storage.read_json(self._path(step, COMMIT))
        if self.local:
            yield Path(self._path(step)), facts
            return
        with tempfile.TemporaryDirectory() as made:
            for name in facts["files"]:
                target = Path(made, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                fs, path = fsspec.core.url_to_fs(self._path(step, name))
                fs.get_file(path, str(target))
            yield Path(made), facts

    def _path(self, step: int, *names: str) -> str:
        return storage.join(self.root, f"step-{step:08d}", *names)

    def _committed(self) -> list[int]:
        found = storage.listing(storage.join(self.root, "step-*", COMMIT))
        return [_step(path) for path in found]

    def _whole(self, step: int) -> bool:
        fs, folder = fsspec.core.url_to_fs(self._path(step))
        found = {path: entry["size"] for path, entry in fs.find(folder, detail=True).items()}
        files = storage.read_json(self._path(step, COMMIT))["files"]
        return all(found.get(f"{folder}/{name}") == size for name, size in files.items())

    def _place(self, file: Path, target: str) -> None:
        if not self.local:
            fs, path = fsspec.core.url_to_fs(target)
            fs.put_file(str(file), path)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(file, target)

    def _remove(self, step: int) -> None:
        """Withdraw the commit first, so that a half removed folder is never taken for whole."""
        fs, folder = fsspec.core.url_to_fs(self._path(step))
        if storage.exists(self._path(step, COMMIT)):
            fs.rm_file(f"{folder}/{COMMIT}")
        fs.rm(folder, recursive=True)


def _step(path: str) -> int:
    """The step in a path below the run's folder."""
    return int(next(part for part in reversed(path.split("/")) if part.startswith("step-"))[5:])
