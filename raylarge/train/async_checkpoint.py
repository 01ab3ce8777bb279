"""Saving while training goes on: a copy is taken at once, a thread writes it.

One checkpoint is on its way at a time: the next one waits for it. What goes wrong in the thread
is told at the next look, so that all ranks may stop together.
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
        """Take where checkpoints go."""
        self._checkpoints, self._rank, self._world_size = checkpoints, rank, world_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._under_way: Future[None] | None = None

    def begin(
        self, step: int, state: TrainState, texts: Mapping[str, str], facts: dict[str, Any]
    ) -> None:
        """Have a checkpoint written; the one before is waited for.

        Args:
            step: it stands for.
            state: this rank's share; nobody may change it any more.
            texts: files of rank 0, shown beside the checkpoints, too.
            facts: what it is committed with.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        self._under_way = self._pool.submit(self._write, step, state, dict(texts), facts)

    def problem(self) -> str:
        """What went wrong with a write that has ended, in words; empty if nothing did."""
        future = self._under_way
        if future is None or not future.done() or (error := future.exception()) is None:
            return ""
        if not isinstance(error, UserError):
            raise error
        return str(error)

    def wait(self) -> None:
        """Until what is under way is written.

        Raises:
            UserError: it could not be.
        """
        if self._under_way is not None:
            self._under_way.result()

    def close(self) -> None:
        """End the thread, when it has written what it has."""
        self._pool.shutdown(wait=True)

    def _write(
        self, step: int, state: TrainState, texts: Mapping[str, str], facts: dict[str, Any]
    ) -> None:
        try:
            with self._checkpoints.scratch() as folder:
                self._write_here(folder, state)
                for name, text in texts.items() if self._rank == 0 else ():
                    Path(folder, name).write_text(text)
                self._checkpoints.put(step, self._rank, folder)
            if self._rank == 0:
                self._checkpoints.commit(step, self._world_size, facts)
        except (UserError, OSError):
            self._checkpoints.check_owner()  # who took over clears what is not whole
            with suppress(UserError):  # room on a full disk
                self._checkpoints.withdraw(step)
            raise
        if self._rank == 0:  # it stands: nothing below may take it back
            self._checkpoints.prune()
            for name, text in texts.items():
                self._checkpoints.show(name, text)

    def _write_here(self, folder: Path, state: TrainState) -> None:
        try:
            state.write(folder, self._rank)
        except Exception as error:  # safetensors has one of its own for a disk that is full
            raise UserError(
                f"{self._checkpoints.root}: a checkpoint could not be written ({error}); make "
                f"room, or choose another out=. What was whole before is kept."
            ) from error
