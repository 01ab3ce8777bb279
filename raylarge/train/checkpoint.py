"""Checkpoints on a disk or in S3: each complete or ignored, the newest complete one is resumed.

    ROOT/step-00000200-<attempt>/ <files of every rank>  rank-0.json  rank-1.json  checkpoint.json

Each rank writes its files under deterministic names, each file atomically. Rank 0 commits:
`checkpoint.json`, which lists all files with their sizes, comes last. A folder without it, or
with a file missing or cut short, is ignored. An attempt is one start of the workers: what a
worker of an earlier attempt still writes goes into its own folder, and `owner.json` names the
attempt whose commits count.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raylarge import storage
from raylarge.errors import UserError
from raylarge.train.checkpoint_reader import COMMIT, CheckpointReader, score

OWNER = "owner.json"
SHARED_S = 600.0  # how long to wait for the files of other ranks
CLAIM_S = 20.0  # how long to wait for rank 0's claim; NFS caches attributes
LOOK_S = 0.05  # between two checks


class Checkpoints(CheckpointReader):
    """Writes, commits and prunes the checkpoints of one run."""

    def __init__(self, root: str, keep: int, attempt: str = "0") -> None:
        """Take a run's folder, which need not exist yet.

        Args:
            root: a path or URL.
            keep: how many of the newest stay, beside the best one.
            attempt: names this life of the workers.
        """
        super().__init__(root)
        self.keep, self.attempt = keep, attempt

    def claim(self) -> None:
        """Let only the commits of this attempt count."""
        storage.write_json(storage.join(self.root, OWNER), {"attempt": self.attempt})

    def check_shared(self) -> None:
        """Refuse a folder that the nodes do not share.

        Raises:
            UserError: what rank 0 claimed does not show here.
        """
        path, until = storage.join(self.root, OWNER), time.monotonic() + CLAIM_S
        while not storage.exists(path) or storage.read_json(path)["attempt"] != self.attempt:
            if time.monotonic() < until:
                time.sleep(LOOK_S)
                continue
            raise UserError(
                f"what rank 0 wrote does not show in {self.root} on another node; all workers "
                f"must share the storage: give out=s3://... or a shared folder."
            )

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a temporary local folder for a rank's files, on the disk of the run's folder."""
        if self.local:
            Path(storage.absolute(self.root)).mkdir(parents=True, exist_ok=True)
        within = storage.absolute(self.root) if self.local else None
        with tempfile.TemporaryDirectory(prefix=".beside-", dir=within) as folder:
            yield Path(folder)

    def put(self, step: int, rank: int, folder: Path) -> None:
        """Move a rank's files into the step's folder, and list them there."""
        sizes = {}
        for file in sorted(folder.iterdir()):
            sizes[file.name] = file.stat().st_size
            storage.put_file(file, self._path(self._name(step), file.name))
        storage.write_json(self._path(self._name(step), f"rank-{rank}.json"), sizes)

    def commit(self, step: int, world_size: int, facts: dict[str, Any]) -> None:
        """Commit a step's folder, once all ranks' files are there.

        Raises:
            UserError: a rank's files do not show, or another run has taken this one over.
        """
        name, files = self._name(step), {}
        for rank in range(world_size):
            files |= self._listed(name, rank)
        self.check_owner()
        commit = {**facts, "step": step, "files": files}
        storage.write_json(self._path(name, COMMIT), commit)

    def check_owner(self) -> None:
        """Refuse to continue where another run has begun.

        Raises:
            UserError: it has.
        """
        owner = storage.read_json(storage.join(self.root, OWNER))["attempt"]
        if owner != self.attempt:
            raise UserError(
                f"another run has taken {self.root} over since this one began; one at a time "
                f"may train into a bundle: end the other, or give another out=."
            )

    def show(self, name: str, text: str) -> None:
        """Write a text file beside the checkpoints."""
        storage.write_bytes(storage.join(self.root, name), text.encode())

    def withdraw(self, step: int) -> None:
        """Remove the files of a step that will not be committed."""
        self._remove(self._name(step))

    def clear(self) -> None:
        """Remove incomplete folders and temporary files of crashed runs."""
        complete = {checkpoint.name for checkpoint in self.complete()}
        for path in storage.children(self.root, "step-*"):
            if (name := path.rsplit("/", 1)[-1]) not in complete:
                self._remove(name)
        if self.local and (root := Path(storage.absolute(self.root))).is_dir():
            for left in root.glob(".beside-*"):
                shutil.rmtree(left, ignore_errors=True)

    def _name(self, step: int) -> str:
        return f"step-{step:08d}-{self.attempt}"

    def _listed(self, name: str, rank: int) -> dict[str, int]:
        """Wait for the list of a rank's files and return their sizes."""
        path, began = self._path(name, f"rank-{rank}.json"), time.monotonic()
        while not storage.exists(path):
            self.check_owner()
            if time.monotonic() - began > SHARED_S:
                raise UserError(
                    f"the files of rank {rank} do not show in {self.root} for {SHARED_S:g} s; see "
                    f"that all workers reach it, then run the same again."
                )
            time.sleep(LOOK_S)
        sizes: dict[str, int] = storage.read_json(path)
        return sizes

    def prune(self) -> None:
        """Remove all but the newest checkpoints and the best one."""
        complete = self.complete()
        kept = {one.name for one in [*complete[: self.keep], min(complete, key=score)]}
        for checkpoint in complete:
            if checkpoint.name not in kept:
                self._remove(checkpoint.name)

    def _remove(self, name: str) -> None:
        """Remove a folder, its commit first, so that it never counts as complete meanwhile."""
        storage.remove(self._path(name, COMMIT))
        storage.remove_all(self._path(name, file) for file in storage.sizes(self._path(name)))
        if self.local:
            shutil.rmtree(storage.absolute(self._path(name)), ignore_errors=True)
