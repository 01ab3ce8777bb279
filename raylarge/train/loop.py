"""The training loop: from the restored step to the last, or until the time is up.

It knows a task only through the engine, workers only through the context and data only through
its sources. A step is a pure function of the weights and the step's number, so 20 steps are
10 + kill + 10 (resume equivalence). Whatever one rank alone can know (the time, a store that
fails, a machine that must go) is added up over the ranks before each step, so all do the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from raylarge import report
from raylarge.errors import UserError
from raylarge.train.async_checkpoint import AsyncCheckpointer
from raylarge.train.budget import Budget, rate
from raylarge.train.checkpoint import Checkpoints, Found
from raylarge.train.context import Context
from raylarge.train.engine import Engine
from raylarge.train.history import HISTORY, SKIPPED, TrainingHistory, number
from raylarge.train.ingest import share
from raylarge.train.micro_batches import StepResult, passes, split
from raylarge.train.monitor.monitor import Monitor
from raylarge.train.monitor.remote_samples import RemoteSamples
from raylarge.train.prefetch import Prefetcher
from raylarge.train.state import StoredState
from raylarge.train.task import Batch, Recipe, Source, Task

NOTICE_S = 5.0  # between two looks for a notice that the machine must go
T = TypeVar("T")
WORST = 3  # samples of a skipped step that each worker names


@dataclass(frozen=True)
class TrainingJob:
    """What is trained on what, where its checkpoints go, and who watches."""

    task: Task
    source: Source
    held: Source | None  # held-out samples
    checkpoints: Checkpoints
    watcher: Monitor
    far: RemoteSamples | None = None  # who draws where weights lie in shards


class Preempted(UserError):
    """The process was told to go, and has saved."""


def fit(engine: Engine, context: Context, work: TrainingJob, recipe: Recipe) -> dict[str, Any]:
    """Train until the recipe's steps are done or its minutes are over.

    Returns:
        `TrainingHistory.facts`, with resumed_from (step or None) and result_step: of the weights
        that the engine holds now.

    Raises:
        UserError: checkpoints of other data; too many steps skipped; data or checkpoints that
            cannot be read or written; no step at all; the process was told to go.
    """
    loop = _Loop(engine, context, work, recipe)
    resumed_from = loop.restore()
    try:
        loop.run()
        loop.history.refuse_nothing()
        step = loop.take_best() if recipe.result == "best" else loop.history.step
    finally:
        loop.checkpointer.close()
        loop.aside(work.watcher.close)
    return loop.history.facts() | {"resumed_from": resumed_from, "result_step": step}


class _Loop:
    """One life of one worker."""

    def __init__(self, engine: Engine, context: Context, work: TrainingJob, recipe: Recipe) -> None:
        self.engine, self.context, self.work, self.recipe = engine, context, work, recipe
        self.history = TrainingHistory(recipe)
        self.checkpointer = AsyncCheckpointer(work.checkpoints, context.rank, context.world_size)
        self.budget = Budget(recipe, 0.0)
        self.passes = passes(recipe.batch, context.world_size, recipe.micro_batch)
        self.saved = (-1, 0.0)  # step and seconds of the last checkpoint
        self.looked = 0.0
        self.held: Batch | None = None
        self.troubles: set[str] = set()  # with what is beside training
        self.heeded = 0  # of a notice that the machine must go: checkpoints made for it
        self.leave_s = 0.0  # that the last of these took

    def restore(self) -> int | None:
        """Go on from the newest whole checkpoint; its step."""
        name = self._together(self._newest)
        name = self.context.all_gather_str(name)[0]
        self._together(self.work.checkpoints.check_shared)
        if name:
            self._together(lambda: self._take_up(self.work.checkpoints.named(name)))
        self.held = self._together(self._held_out)
        self._together(lambda: self.work.watcher.open(self.history.step))
        self.budget = Budget(self.recipe, self.history.seconds)
        return self.history.step if name else None

    def _newest(self) -> str:
        """The checkpoint to go on from; rank 0 looks, and takes the run over."""
        checkpoints = self.work.checkpoints
        if self.context.rank:
            return ""
        checkpoints.claim()
        checkpoints.clear()
        found = checkpoints.newest()
        return found.name if found else ""

    def take_best(self) -> int:
        """Put the weights of the best checkpoint in place of the last ones; its step."""
        checkpoints = self.work.checkpoints
        best = self._together(lambda: None if self.context.rank else checkpoints.best())
        found = checkpoints.named(self.context.all_gather_str(best.name if best else "")[0])
        self._together(lambda: self._load(found))
        step: int = found.facts["step"]
        return step

    def _take_up(self, found: Found) -> None:
        _same_data(found.facts.get("data"), self.work.source.digest)
        tables = self._load(found)
        self.history.resume(found.facts, *tables)
        self.saved = (self.history.step, self.history.seconds)

    def _load(self, found: Found) -> list[str]:
        """Have the engine hold a checkpoint's state; the content of the history's tables.

        Raises:
            UserError: its files are damaged.
        """
        try:
            with self.work.checkpoints.fetch(found) as folder:
                self.engine.load(StoredState(folder))
                return [(folder / name).read_text() for name in (HISTORY, SKIPPED)]
        except (SafetensorError, UnicodeDecodeError) as error:
            raise UserError(
                f"the checkpoint {found.name} in {self.work.checkpoints.root} is damaged "
                f"({error}); remove it, and the same command goes on from the one before."
            ) from error

    def _held_out(self) -> Batch | None:
        """This rank's share of the held-out samples whose loss is told."""
        if self.work.held is None or not self.recipe.validate:
            return None
        context = self.context
        samples = share(0, self._held_count(), context.rank, context.world_size)
        return self.work.task.draw(self.work.held.batch(samples))

    def _held_count(self) -> int:
        """No more than there are, and one for each rank."""
        held = self.work.held
        rows = sum(held.facts.counts.values()) if held is not None else 0
        return max(min(self.recipe.validate, rows), self.context.world_size)

    def _together(self, action: Callable[[], T]) -> T:
        """What an action of every rank gives; where it fails on one, all stop.

        Raises:
            UserError: what one of them said.
        """
        found: list[T] = []
        problem = _said(lambda: found.append(action()))
        if self.context.all_reduce_sum([float(bool(problem))])[0]:
            raise UserError(next(words for words in self.context.all_gather_str(problem) if words))
        return found[0]

    def aside(self, action: Callable[[], None]) -> None:
        """Something beside training: what goes wrong with it is said, once, and no more."""
        problem = _said(action)
        if problem and problem not in self.troubles:
            self.troubles.add(problem)
            report.say(f"training goes on: {problem}")

    def run(self) -> None:
        """Steps, until it is over."""
        task, source = self.work.task, self.work.source
        with Prefetcher(
            task, source, self.context, self.recipe.batch, self.history.step
        ) as prefetcher:
            while True:
                batch, problem = prefetcher.take()
                self._agree(problem or self.checkpointer.problem())
                if self.budget.fraction(self.history.step) >= 1.0:
                    break
                self._step(batch, prefetcher.waited)
        self.history.seconds = max(self.history.seconds, self.budget.agreed)
        if self.saved[0] != self.history.step:
            self._save()
        self._await()
        self._picture()
        if self.work.far is not None and self.context.rank == 0:
            self.work.far.wait()

    def _agree(self, problem: str) -> None:
        """What all ranks must know before a step.

        Raises:
            UserError: one of them cannot go on.
        """
        now = self.budget.seconds() if self.context.rank == 0 else 0.0
        seconds, failed = self.context.all_reduce_sum([now, float(bool(problem))])
        self.budget.agreed = seconds
        if failed:
            said = [words for words in self.context.all_gather_str(problem) if words]
            raise UserError(said[0])
        if seconds - self.looked >= NOTICE_S:
            self.looked = seconds
            self._heed(self.context.preemption_s())

    def _step(self, batch: Batch, waited: float) -> None:
        lr = rate(self.recipe, self.history.step, self.budget.fraction(self.history.step))
        most = self.history.most()
        made = self.engine.step(split(batch, self.passes), lr, most)
        if not made.applied:
            self.history.skip(made.loss, most, self.context.all_gather_str(_worst(batch, made)))
            if self.context.rank == 0:
                skips = self.history.tables()[SKIPPED]
                self.aside(lambda: self.work.checkpoints.show(SKIPPED, skips))
        self.history.note(made.loss, made.applied, lr, self.budget.seconds())
        watcher = self.work.watcher
        watcher.step(batch, made, self.recipe.batch, waited)
        if self.history.step % self.recipe.log_every == 0:
            values = {"loss": self.history.loss, "lr": lr, "gradient norm": made.norm}
            figures = watcher.figures_of(self.context)
            self.aside(lambda: watcher.tell(self.history.step, {**values, **figures}))
        self.aside(lambda: self.context.report(self._status()))
        if self.recipe.sheet_every and self.history.step % self.recipe.sheet_every == 0:
            self._picture()
        if self._due():
            self._save()

    def _due(self) -> bool:
        late = self.budget.agreed - self.saved[1] >= self.recipe.checkpoint_minutes * 60
        return late or self.history.step % self.recipe.checkpoint_every == 0

    def _save(self) -> None:
        """A checkpoint of this step, written while training goes on."""
        lr = rate(self.recipe, self.history.step, self.budget.fraction(self.history.step))
        score = self._validate()
        if score is not None:
            self.history.validated(score, lr)
            told = {"loss/held out": score}
            self.aside(lambda: self.work.watcher.tell(self.history.step, told))
        self._await()
        facts = {"data": self.work.source.digest, "score": score, **self.history.state()}
        self.checkpointer.begin(
            self.history.step, self.engine.state(), self.history.tables(), facts
        )
        self.saved = (self.history.step, self.budget.agreed)
        self.aside(self.work.watcher.flush)

    def _await(self) -> None:
        """Until what is being written stands, on all ranks."""
        self._together(self.checkpointer.wait)

    def _heed(self, left: float) -> None:
        """Save when a machine must go, and once more at the last look before it does."""
        last = left <= NOTICE_S + 1 + 2 * self.leave_s
        told = self.context.all_reduce_sum([float(left < math.inf), float(last)])
        due = sum(bool(count) for count in told)
        if due > self.heeded:
            began = time.monotonic()
            self._leave()
            self.leave_s = time.monotonic() - began
        self.heeded = due

    def _leave(self) -> None:
        """Save at once; who is nobody's worker goes."""
        if self.saved[0] != self.history.step:
            self._save()
        self._await()
        if self.context.exits_on_preemption:
            raise Preempted(
                f"told to stop, and saved at step {self.history.step}; the same command goes on."
            )

    def _validate(self) -> float | None:
        """The loss of some held-out samples, always the same ones, at the same noise."""
        if self.held is None:
            return None
        context, count = self.context, self._held_count()
        losses = [
            self.engine.losses(piece.batch)[: piece.real]
            for piece in split(self.held, passes(count, context.world_size, self._held_size()))
        ]
        total = self.context.all_reduce_sum([float(torch.cat(losses).double().sum())])[0]
        return number(total / count)

    def _held_size(self) -> int:
        """How many held-out samples go in one pass: as many as of training."""
        share_ = -(-self.recipe.batch // self.context.world_size)
        return self.recipe.micro_batch or share_

    def _picture(self) -> None:
        """A sheet of samples, drawn by rank 0 while the others wait; shards go elsewhere."""
        if (far := self.work.far) is not None:
            if self.saved[0] != self.history.step:
                self._save()
            if self.context.rank == 0:
                self.aside(lambda: far.ask(self.history.step))
            return
        if self.context.rank == 0:
            with self.engine.averaged():
                self.aside(self._draw)
        self.context.all_reduce_sum([0.0])

    def _draw(self) -> None:
        source = self.work.held or self.work.source
        self.work.watcher.picture(self.history.step, self.work.task, source)

    def _status(self) -> dict[str, Any]:
        """What the progress line shows."""
        history, clock = self.history, self.budget
        fraction, before = clock.fraction(history.step), clock.fraction_at(*history.began)
        spent = history.seconds - history.began[1]
        prefetcher = spent * (1 - fraction) / (fraction - before) if fraction > before else None
        shown = {"step": history.step, "loss": number(history.loss), "fraction": fraction}
        return shown | {"rate": history.speed(), "eta_s": prefetcher}


def _said(action: Callable[[], None]) -> str:
    """What a user is told of an action; nothing where all is well."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def _same_data(before: str | None, now: str) -> None:
    if before != now:
        raise UserError(
            f"the checkpoint was trained on other data (rows {before}, now {now}); give the data "
            f"it was trained on, or another out=, or remove its folder below .train to begin anew."
        )


def _worst(batch: Batch, made: StepResult) -> str:
    """The samples of this worker whose losses are not finite, or else the largest."""
    losses = made.losses.nan_to_num(math.inf, math.inf, math.inf)
    order = losses.argsort(descending=True)[:WORST].tolist()
    return " ".join(str(int(batch["sample"][i])) for i in order)
