"""The training loop: from the restored step to the last, or until the time is up.

It knows a task only through the engine, workers only through the context and data only through
its sources. A step is a pure function of the weights and the step's number, so a run that is
interrupted and resumed gives the same weights (resume equivalence). What one rank alone can
know (the time, a store that fails, a notice of preemption) is summed over the ranks before each
step, so all do the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from raylarge.errors import UserError
from raylarge.train.budget import Budget, rate
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.checkpointing import RunState
from raylarge.train.context import Context
from raylarge.train.coordination import BestEffort, on_all_ranks, raise_first
from raylarge.train.engine import Engine
from raylarge.train.history import SKIPPED, TrainingHistory, number
from raylarge.train.micro_batches import StepResult, passes, split
from raylarge.train.monitor.monitor import Monitor
from raylarge.train.monitor.remote_samples import RemoteSamples
from raylarge.train.preemption import PreemptionWatch
from raylarge.train.prefetch import Prefetcher
from raylarge.train.task import Batch, Recipe, SampleSource, TrainTask
from raylarge.train.validation import Validator

WORST = 3  # samples of a skipped step that each worker names


@dataclass(frozen=True)
class TrainingJob:
    """What is trained on which samples, where its checkpoints go, and what watches it."""

    task: TrainTask
    source: SampleSource
    held_out: SampleSource | None
    checkpoints: Checkpoints
    monitor: Monitor
    remote_samples: RemoteSamples | None = None  # draws samples where weights are sharded


class Preempted(UserError):
    """The process was asked to stop, and has saved."""


def fit(engine: Engine, context: Context, job: TrainingJob, recipe: Recipe) -> dict[str, Any]:
    """Train until the recipe's steps are done or its minutes are over.

    Returns:
        `TrainingHistory.facts`, with resumed_from (step or None) and result_step: of the weights
        that the engine holds now.

    Raises:
        UserError: checkpoints of other data; too many steps skipped; data or checkpoints that
            cannot be read or written; no step at all.
        Preempted: the process was asked to stop.
    """
    loop = _Loop(engine, context, job, recipe)
    resumed_from = loop.restore()
    try:
        loop.run()
        loop.history.refuse_nothing()
        step = loop.state.load_best() if recipe.result == "best" else loop.history.step
    finally:
        loop.state.close()
        loop.best_effort(job.monitor.close)
    return loop.history.facts() | {"resumed_from": resumed_from, "result_step": step}


class _Loop:
    """The steps of one worker, from its start to its end."""

    def __init__(self, engine: Engine, context: Context, job: TrainingJob, recipe: Recipe) -> None:
        self.engine, self.context, self.job, self.recipe = engine, context, job, recipe
        self.history = TrainingHistory(recipe)
        digest = job.source.digest
        self.state = RunState(engine, context, self.history, job.checkpoints, digest)
        self.best_effort = BestEffort()
        self.preemption = PreemptionWatch(context, self._save_and_exit)
        self.passes = passes(recipe.batch, context.world_size, recipe.micro_batch)

    def restore(self) -> int | None:
        """Resume from the newest checkpoint, if there is one; return its step."""
        resumed_from = self.state.restore()
        held_out = self.job.held_out
        self.validator = on_all_ranks(
            self.context, lambda: Validator(self.job.task, held_out, self.recipe, self.context)
        )
        on_all_ranks(self.context, lambda: self.job.monitor.open(self.history.step))
        self.budget = Budget(self.recipe, self.history.seconds)
        return resumed_from

    def run(self) -> None:
        """Make all steps, with checkpoints, validation and samples in between."""
        job, history = self.job, self.history
        batches = Prefetcher(job.task, job.source, self.context, self.recipe.batch, history.step)
        with batches:
            while True:
                batch, problem = batches.take()
                self._agree(problem or self.state.problem())
                if self.budget.fraction(history.step) >= 1.0:
                    break
                self._step(batch, batches.waited)
        history.seconds = max(history.seconds, self.budget.agreed)
        self._save()
        self.state.wait()
        self._draw_samples()
        if job.remote_samples is not None and self.context.rank == 0:
            job.remote_samples.wait()

    def _agree(self, problem: str) -> None:
        """Share time, problems and notices of preemption among all ranks before a step.

        Raises:
            UserError: one of them cannot continue.
        """
        now = self.budget.seconds() if self.context.rank == 0 else 0.0
        seconds, failures = self.context.all_reduce_sum([now, float(bool(problem))])
        self.budget.agreed = seconds
        if failures:
            raise_first(self.context, problem)
        self.preemption.check(seconds)

    def _step(self, batch: Batch, waited: float) -> None:
        history, recipe, lr = self.history, self.recipe, self._lr()
        loss_limit = history.most()
        result = self.engine.step(split(batch, self.passes), lr, loss_limit)
        if not result.applied:
            history.skip(
                result.loss, loss_limit, self.context.all_gather_str(_worst(batch, result))
            )
            if self.context.rank == 0:
                skips = history.tables()[SKIPPED]
                self.best_effort(lambda: self.job.checkpoints.show(SKIPPED, skips))
        history.note(result.loss, result.applied, lr, self.budget.seconds())
        self._report(batch, result, waited, lr)
        if recipe.sheet_every and history.step % recipe.sheet_every == 0:
            self._draw_samples()
        late = self.budget.agreed - self.state.saved_s >= recipe.checkpoint_minutes * 60
        if late or history.step % recipe.checkpoint_every == 0:
            self._save()

    def _report(self, batch: Batch, result: StepResult, waited: float, lr: float) -> None:
        """Send a step's figures to the monitor and to the driver's progress line."""
        history, monitor = self.history, self.job.monitor
        monitor.step(batch, result, self.recipe.batch, waited)
        if history.step % self.recipe.log_every == 0:
            values = {"loss": history.loss, "lr": lr, "gradient norm": result.norm}
            values |= monitor.figures_of(self.context)
            self.best_effort(lambda: monitor.scalars(history.step, values))
        self.best_effort(lambda: self.context.report(_status(history, self.budget)))

    def _save(self) -> None:
        """Validate and begin to write a checkpoint, unless this step has one."""
        if self.state.saved_step == self.history.step:
            return
        lr, monitor = self._lr(), self.job.monitor
        score = self.validator.loss(self.engine)
        if score is not None:
            self.history.validated(score, lr)
            values = {"loss/held out": score}
            self.best_effort(lambda: monitor.scalars(self.history.step, values))
        self.state.save(score, self.budget.agreed)
        self.best_effort(monitor.flush)

    def _save_and_exit(self) -> None:
        """Write a checkpoint at once; exit, unless Ray Train ends its workers itself."""
        self._save()
        self.state.wait()
        if self.context.exits_on_preemption:
            raise Preempted(
                f"told to stop, and saved at step {self.history.step}; the same command goes on."
            )

    def _draw_samples(self) -> None:
        """Draw a grid of samples on rank 0 while the others wait; sharded weights: remotely."""
        job, step = self.job, self.history.step
        if (remote := job.remote_samples) is not None:
            self._save()
            if self.context.rank == 0:
                self.best_effort(lambda: remote.request(step))
            return
        if self.context.rank == 0:
            source = job.held_out or job.source
            with self.engine.averaged():
                self.best_effort(lambda: job.monitor.picture(step, job.task, source))
        self.context.all_reduce_sum([0.0])  # a barrier

    def _lr(self) -> float:
        step = self.history.step
        return rate(self.recipe, step, self.budget.fraction(step))


def _status(history: TrainingHistory, budget: Budget) -> dict[str, Any]:
    """Return what the progress line shows."""
    fraction, at_start = budget.fraction(history.step), budget.fraction_at(*history.began)
    spent = history.seconds - history.began[1]
    eta_s = spent * (1 - fraction) / (fraction - at_start) if fraction > at_start else None
    status = {"step": history.step, "loss": number(history.loss), "fraction": fraction}
    return status | {"rate": history.speed(), "eta_s": eta_s}


def _worst(batch: Batch, result: StepResult) -> str:
    """Return the samples of this worker whose losses are not finite, or else the largest."""
    losses = result.losses.nan_to_num(math.inf, math.inf, math.inf)
    order = losses.argsort(descending=True)[:WORST].tolist()
    return " ".join(str(int(batch["sample"][i])) for i in order)
