"""Restoring and saving a run: an engine's state and the training history, on all ranks alike."""

from __future__ import annotations

from collections.abc import Callable

from safetensors import SafetensorError

from raylarge.errors import UserError
from raylarge.train.async_checkpoint import AsyncCheckpointer
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.checkpoint_reader import Checkpoint
from raylarge.train.context import Context
from raylarge.train.coordination import on_all_ranks
from raylarge.train.engine import Engine
from raylarge.train.history import HISTORY, SKIPPED, TrainingHistory
from raylarge.train.state import StoredState


class RunState:
    """The engine and the history of a run, restored from and saved to its checkpoints."""

    def __init__(
        self,
        engine: Engine,
        context: Context,
        history: TrainingHistory,
        checkpoints: Checkpoints,
        data_digest: str,
    ) -> None:
        """Start without a checkpoint; `data_digest` identifies the training rows."""
        self._engine, self._context, self._history = engine, context, history
        self._checkpoints, self._data = checkpoints, data_digest
        self._writer = AsyncCheckpointer(checkpoints, context.rank, context.world_size)
        self.saved_step, self.saved_s = -1, 0.0

    def restore(self) -> int | None:
        """Resume from the newest whole checkpoint; return its step, or None without one.

        Raises:
            UserError: checkpoints of other data, damaged ones, storage that ranks do not share.
        """
        name = self._rank_0(self._claim_newest)
        on_all_ranks(self._context, self._checkpoints.check_shared)
        if not name:
            return None
        on_all_ranks(self._context, lambda: self._resume(self._checkpoints.named(name)))
        return self._history.step

    def load_best(self) -> int:
        """Replace the last weights with those of the best checkpoint; return its step."""
        name = self._rank_0(self._best)
        checkpoint = self._checkpoints.named(name)
        on_all_ranks(self._context, lambda: self._load(checkpoint))
        step: int = checkpoint.facts["step"]
        return step

    def save(self, score: float | None, seconds: float) -> None:
        """Begin to write a checkpoint of the present step; training continues meanwhile.

        Args:
            score: held-out loss, or None.
            seconds: training time on which all ranks agree.
        """
        self.wait()
        history = self._history
        facts = {"data": self._data, "score": score, **history.state()}
        self._writer.begin(history.step, self._engine.state(), history.tables(), facts)
        self.saved_step, self.saved_s = history.step, seconds

    def wait(self) -> None:
        """Wait until all ranks have written their part of the last checkpoint."""
        on_all_ranks(self._context, self._writer.wait)

    def problem(self) -> str:
        """Return the message of a write that failed, or an empty string."""
        return self._writer.problem()

    def close(self) -> None:
        """Wait for the writing thread to end."""
        self._writer.close()

    def _rank_0(self, name_of: Callable[[], str]) -> str:
        """Return on every rank the name of the checkpoint that rank 0 chooses."""
        name = on_all_ranks(self._context, lambda: "" if self._context.rank else name_of())
        return self._context.all_gather_str(name)[0]

    def _claim_newest(self) -> str:
        self._checkpoints.claim()
        self._checkpoints.clear()
        newest = self._checkpoints.newest()
        return newest.name if newest else ""

    def _best(self) -> str:
        best = self._checkpoints.best()
        return best.name if best else ""

    def _resume(self, checkpoint: Checkpoint) -> None:
        previous = checkpoint.facts.get("data")
        if previous != self._data:
            raise UserError(
                f"the checkpoint was trained on other data (rows {previous}, now {self._data}); "
                f"give the data it was trained on, or another out=, or remove its folder below "
                f".train to begin anew."
            )
        self._history.resume(checkpoint.facts, *self._load(checkpoint))
        self.saved_step, self.saved_s = self._history.step, self._history.seconds

    def _load(self, checkpoint: Checkpoint) -> list[str]:
        """Load a checkpoint into the engine; return the tables of its history.

        Raises:
            UserError: its files are damaged.
        """
        try:
            with self._checkpoints.fetch(checkpoint) as folder:
                self._engine.load(StoredState(folder))
                return [(folder / name).read_text() for name in (HISTORY, SKIPPED)]
        except (SafetensorError, UnicodeDecodeError) as error:
            raise UserError(
                f"the checkpoint {checkpoint.name} in {self._checkpoints.root} is damaged "
                f"({error}); remove it, and the same command goes on from the one before."
            ) from error
