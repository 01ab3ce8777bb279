"""Checkpoints on a disk or in S3: whole or absent, the newest valid one found again.

    ROOT/step-00000200-<attempt>/ <files of every rank>  rank-0.json  rank-1.json  checkpoint.json

Each rank puts its files under deterministic names, whole or absent each. Rank 0 commits:
`checkpoint.json`, which lists all files with their sizes, comes last. A folder without it, or
with a file missing or cut short, does not exist. An attempt is one life of the workers: what a
worker that was given up still writes falls into its own folder, and `owner.json` says whose
commits count.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from raylarge import storage
from raylarge.errors import MissingResource, UserError
from raylarge.storage import cache

COMMIT, OWNER = "checkpoint.json", "owner.json"
_FETCHED = "files"
"""Of a checkpoint out of a store, in its entry of the cache."""
SHARED_S = 600.0  # how long the files of other ranks may take to show
CLAIM_S = 20.0  # how long what rank 0 claims may take to show, by NFS's attribute cache
LOOK_S = 0.05


def document(path: str) -> Any:
    """Return a JSON document, or None where the file is damaged: empty, cut short, or no JSON.

    Raises:
        UserError: the file is missing, or the store fails.
    """
    try:
        return json.loads(storage.read_bytes(path))
    except ValueError:  # also bytes that are no text
        return None


class Found(NamedTuple):
    """A whole checkpoint: the name of its folder, and what it was committed with."""

    name: str
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, root: str, keep: int, attempt: str = "0") -> None:
        """Take a run's folder, which need not exist yet.

        Args:
            root: a path or URL.
            keep: how many of the newest stay, beside the best one.
            attempt: names this life of the workers.
        """
        self.root, self.keep, self.attempt = root, keep, attempt
        self.local = storage.is_local(root)

    def claim(self) -> None:
        """Have the commits of this attempt count, and those of no other."""
        storage.write_json(storage.join(self.root, OWNER), {"attempt": self.attempt})

    def check_shared(self) -> None:
        """Refuse a folder that is another one on every node.

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
        """A local folder to write a rank's files to, on the disk they will stay on."""
        if self.local:
            Path(storage.absolute(self.root)).mkdir(parents=True, exist_ok=True)
        within = storage.absolute(self.root) if self.local else None
        with tempfile.TemporaryDirectory(prefix=".beside-", dir=within) as made:
            yield Path(made)

    def put(self, step: int, rank: int, made: Path) -> None:
        """Move a rank's files into the step's folder, and list them there."""
        sizes = {}
        for file in sorted(made.iterdir()):
            sizes[file.name] = file.stat().st_size
            storage.put_file(file, self._path(self._name(step), file.name))
        storage.write_json(self._path(self._name(step), f"rank-{rank}.json"), sizes)

    def commit(self, step: int, world_size: int, facts: dict[str, Any]) -> None:
        """Declare a step's folder whole, once all ranks' files are there.

        Raises:
            UserError: a rank's files do not show, or another run has taken this one over.
        """
        name, files = self._name(step), {}
        for rank in range(world_size):
            files |= self._listed(name, rank)
        self.check_owner()
        told = {**facts, "step": step, "files": files}
        storage.write_json(self._path(name, COMMIT), told)

    def check_owner(self) -> None:
        """Refuse to go on where another run has begun.

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
        """Keep a text beside the checkpoints."""
        storage.write_bytes(storage.join(self.root, name), text.encode())

    def withdraw(self, step: int) -> None:
        """Remove what was put of a step that will not be committed."""
        self._remove(self._name(step))

    def newest(self) -> Found | None:
        """The newest whole checkpoint."""
        return next(iter(self._whole_ones()), None)

    def best(self) -> Found | None:
        """The whole checkpoint of the lowest `score`, the newest where none has one."""
        return min(self._whole_ones(), key=_score, default=None)

    def named(self, name: str) -> Found:
        """A whole checkpoint by the name of its folder."""
        return Found(name, storage.read_json(self._path(name, COMMIT)))

    def clear(self) -> None:
        """Remove what crashed runs left: folders that are not whole, files written beside."""
        whole = {found.name for found in self._whole_ones()}
        for path in storage.children(self.root, "step-*"):
            if (name := path.rsplit("/", 1)[-1]) not in whole:
                self._remove(name)
        if self.local and (root := Path(storage.absolute(self.root))).is_dir():
            for left in root.glob(".beside-*"):
                shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def fetch(self, found: Found) -> Iterator[Path]:
        """A whole checkpoint as a local folder; one process of a node fetches it for all.

        Raises:
            UserError: there is no room for it in the node's cache.
        """
        path = self._path(found.name)
        if self.local:
            yield Path(storage.absolute(path))
            return
        sizes = found.facts["files"]

        def make(folder: Path) -> None:
            (folder / _FETCHED).mkdir()
            for name in sizes:
                with (folder / _FETCHED / name).open("wb") as target:
                    for piece in storage.chunks(storage.join(path, name)):
                        target.write(piece)

        identity = f"{path} {json.dumps(found.facts, sort_keys=True)}"
        try:
            held = cache.acquire(identity, sum(sizes.values()), make, _FETCHED)
        except MissingResource as lack:
            raise UserError(f"checkpoint {path}: {lack}") from lack
        try:
            yield Path(held.path)
        finally:
            held.close()

    def _name(self, step: int) -> str:
        return f"step-{step:08d}-{self.attempt}"

    def _path(self, *names: str) -> str:
        return storage.join(self.root, *names)

    def _listed(self, name: str, rank: int) -> dict[str, int]:
        """The files of a rank, when it has put them all."""
        path, began = self._path(name, f"rank-{rank}.json"), time.monotonic()
        while not storage.exists(path):
            self.check_owner()
            if time.monotonic() - began > SHARED_S:
                raise UserError(
                    f"the files of rank {rank} do not show in {self.root} for {SHARED_S:g} s; see "
                    f"that all workers reach it, then run the same again."
                )
            time.sleep(LOOK_S)
        found: dict[str, int] = storage.read_json(path)
        return found

    def _whole_ones(self) -> list[Found]:
        """All whole checkpoints, the newest first."""
        return [one for _, one in self._inspected() if isinstance(one, Found)]

    def damage(self) -> list[str]:
        """Return a sentence for each committed checkpoint that is damaged, the newest first.

        Only checkpoints newer than the newest whole one count: resuming passes over them.
        """
        sentences: list[str] = []
        for name, one in self._inspected():
            if isinstance(one, Found):
                rest = f"training resumes from step {one.facts['step']}"
                return [f"{sentence}; {rest}." for sentence in sentences]
            if one:
                path = self._path(name)
                sentences.append(f"the checkpoint {path} is damaged and is passed over: {one}")
        return [
            f"{sentence}; no other is whole, so training starts anew." for sentence in sentences
        ]

    def _inspected(self) -> Iterator[tuple[str, Found | str]]:
        """Names of all checkpoint folders, the newest first, each with its checkpoint.

        In place of a checkpoint that is not whole stands what is wrong with it; nothing for a
        folder that was never committed, as a killed run leaves it.
        """
        names = [path.rsplit("/", 1)[-1] for path in storage.children(self.root, "step-*")]
        return ((name, self._inspect(name)) for name in sorted(names, reverse=True))

    def _inspect(self, name: str) -> Found | str:
        sizes = storage.sizes(self._path(name))
        if COMMIT not in sizes:
            return ""
        facts = document(self._path(name, COMMIT))
        if not _is_commit(facts):
            return f"{COMMIT} ({sizes[COMMIT]} bytes) is empty, cut short or no commit"
        for file, size in facts["files"].items():
            if file not in sizes:
                return f"{file} is missing"
            if sizes[file] != size:
                return f"{file} has {sizes[file]} bytes instead of {size}"
        return Found(name, facts)

    def prune(self) -> None:
        """Remove all but the newest checkpoints and the best one."""
        found = self._whole_ones()
        kept = {one.name for one in found[: self.keep]} | {min(found, key=_score).name}
        for one in found:
            if one.name not in kept:
                self._remove(one.name)

    def _remove(self, name: str) -> None:
        """Withdraw the commit first, so that a half removed folder is never taken for whole."""
        storage.remove(self._path(name, COMMIT))
        storage.remove_all(self._path(name, file) for file in storage.sizes(self._path(name)))
        if self.local:
            shutil.rmtree(storage.absolute(self._path(name)), ignore_errors=True)


def _is_commit(facts: Any) -> bool:
    """Whether a document is what `Checkpoints.commit` writes."""
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        return False
    numbers = [facts.get("step"), facts.get("score") or 0, *facts["files"].values()]
    return bool(facts["files"]) and all(isinstance(one, int | float) for one in numbers)


def _score(found: Found) -> float:
    score = found.facts.get("score")
    return math.inf if score is None else float(score)
