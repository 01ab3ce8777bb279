"""Asynchronous checkpoints: the state is copied at once, and a thread writes it.

One checkpoint is written at a time; the next one waits for it. Errors of the thread are returned
by `problem`, so that all ranks can stop together.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from raylarge.errors import UserError
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.state import TrainState


class AsyncCheckpointer:
    """Writes one rank's share of checkpoints; rank 0's commits them."""

    def __init__(self, checkpoints: Checkpoints, rank: int, world_size: int) -> None:
        """Take the checkpoints of the run, and this rank."""
        self._checkpoints, self._rank, self._world_size = checkpoints, rank, world_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._future: Future[None] | None = None

    def begin(
        self, step: int, state: TrainState, texts: Mapping[str, str], facts: dict[str, Any]
    ) -> None:
        """Start to write a checkpoint, after the previous one.

        Args:
            step: of the checkpoint.
            state: this rank's share; it must not change any more.
            texts: files that rank 0 writes, into the checkpoint and beside it.
            facts: stored in the commit.

        Raises:
            UserError: the previous one could not be written.
        """
        self.wait()
        self._future = self._pool.submit(self._write, step, state, dict(texts), facts)

    def problem(self) -> str:
        """Return the error message of a write that has ended, or an empty string."""
        future = self._future
        if future is None or not future.done() or (error := future.exception()) is None:
            return ""
        if not isinstance(error, UserError):
            raise error
        return str(error)

    def wait(self) -> None:
        """Wait until the checkpoint is written.

        Raises:
            UserError: it could not be written.
        """
        if self._future is not None:
            self._future.result()

    def close(self) -> None:
        """Stop the thread, after its last write."""
        self._pool.shutdown(wait=True)

    def _write(
        self, step: int, state: TrainState, texts: Mapping[str, str], facts: dict[str, Any]
    ) -> None:
        try:
            with self._checkpoints.scratch() as folder:
                self._write_state(folder, state)
                for name, text in texts.items() if self._rank == 0 else ():
                    Path(folder, name).write_text(text)
                self._checkpoints.put(step, self._rank, folder)
            if self._rank == 0:
                self._checkpoints.commit(step, self._world_size, facts)
        except (UserError, OSError):
            self._checkpoints.check_owner()  # another run removes incomplete folders itself
            with suppress(UserError):  # frees space on a full disk
                self._checkpoints.withdraw(step)
            raise
        if self._rank == 0:  # it is committed: errors below must not remove it
            self._checkpoints.prune()
            for name, text in texts.items():
                self._checkpoints.show(name, text)

    def _write_state(self, folder: Path, state: TrainState) -> None:
        try:
            state.write(folder, self._rank)
        except Exception as error:  # safetensors has one of its own for a disk that is full
            raise UserError(
                f"{self._checkpoints.root}: a checkpoint could not be written ({error}); make "
                f"room, or choose another out=. What was whole before is kept."
            ) from error
