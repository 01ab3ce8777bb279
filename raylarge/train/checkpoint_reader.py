"""Finding and reading the newest and the best complete checkpoint; describing damaged ones."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from raylarge import storage
from raylarge.errors import MissingResource, UserError
from raylarge.storage import cache

COMMIT = "checkpoint.json"
_FETCHED = "files"  # folder of a fetched checkpoint in its entry of the cache


def document(path: str) -> Any:
    """Return a JSON document, or None where the file is damaged: empty, cut short, or no JSON.

    Raises:
        UserError: the file is missing, or the store fails.
    """
    try:
        return json.loads(storage.read_bytes(path))
    except ValueError:  # also bytes that are no text
        return None


class Checkpoint(NamedTuple):
    """A complete checkpoint: the name of its folder, and the facts of its commit."""

    name: str
    facts: dict[str, Any]


class CheckpointReader:
    """Reads the checkpoints in a run's folder, which need not exist yet."""

    def __init__(self, root: str) -> None:
        """Take the run's folder, a path or URL."""
        self.root, self.local = root, storage.is_local(root)

    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint."""
        return next(iter(self.complete()), None)

    def best(self) -> Checkpoint | None:
        """Return the complete checkpoint of the lowest score, the newest where none has one."""
        return min(self.complete(), key=score, default=None)

    def named(self, name: str) -> Checkpoint:
        """Return a complete checkpoint by the name of its folder."""
        return Checkpoint(name, storage.read_json(self._path(name, COMMIT)))

    def damage(self) -> list[str]:
        """Return a sentence for each committed checkpoint that is damaged, the newest first.

        Only checkpoints newer than the newest whole one count: resuming passes over them.
        """
        sentences: list[str] = []
        for name, result in self._inspected():
            if isinstance(result, Checkpoint):
                rest = f"training resumes from step {result.facts['step']}"
                return [f"{sentence}; {rest}." for sentence in sentences]
            if result:
                path = self._path(name)
                sentences.append(f"the checkpoint {path} is damaged and is passed over: {result}")
        return [
            f"{sentence}; no other is whole, so training starts anew." for sentence in sentences
        ]

    @contextmanager
    def fetch(self, checkpoint: Checkpoint) -> Iterator[Path]:
        """Yield a complete checkpoint as a local folder; one process of a node fetches it for all.

        Raises:
            UserError: there is no room for it in the node's cache.
        """
        path = self._path(checkpoint.name)
        if self.local:
            yield Path(storage.absolute(path))
            return
        sizes = checkpoint.facts["files"]

        def make(folder: Path) -> None:
            (folder / _FETCHED).mkdir()
            for name in sizes:
                with (folder / _FETCHED / name).open("wb") as target:
                    for piece in storage.chunks(storage.join(path, name)):
                        target.write(piece)

        identity = f"{path} {json.dumps(checkpoint.facts, sort_keys=True)}"
        try:
            lease = cache.acquire(identity, sum(sizes.values()), make, _FETCHED)
        except MissingResource as error:
            raise UserError(f"checkpoint {path}: {error}") from error
        try:
            yield Path(lease.path)
        finally:
            lease.close()

    def _path(self, *names: str) -> str:
        return storage.join(self.root, *names)

    def complete(self) -> list[Checkpoint]:
        """Return all complete checkpoints, the newest first."""
        return [result for _, result in self._inspected() if isinstance(result, Checkpoint)]

    def _inspected(self) -> Iterator[tuple[str, Checkpoint | str]]:
        """Return the names of all checkpoint folders, the newest first, with their checkpoints.

        In place of an incomplete checkpoint is a description of its damage; an empty string for
        a folder that was never committed, as a killed run leaves it.
        """
        names = [path.rsplit("/", 1)[-1] for path in storage.children(self.root, "step-*")]
        return ((name, self._inspect(name)) for name in sorted(names, reverse=True))

    def _inspect(self, name: str) -> Checkpoint | str:
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
        return Checkpoint(name, facts)


def _is_commit(facts: Any) -> bool:
    """Return whether a document is one that `Checkpoints.commit` writes."""
    if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
        return False
    numbers = [facts.get("step"), facts.get("score") or 0, *facts["files"].values()]
    return bool(facts["files"]) and all(isinstance(number, int | float) for number in numbers)


def score(checkpoint: Checkpoint) -> float:
    """Return the held-out loss of a checkpoint; infinity where it has none."""
    loss = checkpoint.facts.get("score")
    return math.inf if loss is None else float(loss)
