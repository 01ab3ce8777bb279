"""The training loop: from the restored step to the last, or until the time is up.

It knows a task only through the engine, workers only through the context and data only through
its sources. A step is a pure function of the weights and the step's number, so 20 steps are
10 + kill + 10 (law 6). Whatever one rank alone can know (the time, a store that fails, a
machine that must go) is added up over the ranks before each step, so all do the same.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from raylarge.errors import UserError
from raylarge.train.ahead import Ahead
from raylarge.train.checkpoint import Checkpoints, Found
from raylarge.train.context import Context
from raylarge.train.engine import Engine
from raylarge.train.ingest import share
from raylarge.train.journal import HISTORY, SKIPPED, Journal, number
from raylarge.train.pieces import Step, passes, split
from raylarge.train.saver import Saver
from raylarge.train.state import Stored
from raylarge.train.task import Batch, Recipe, Source, Task
from raylarge.train.watch.far_sheet import FarSheets
from raylarge.train.watch.watcher import Watcher

NOTICE_S = 5.0  # between two looks for a notice that the machine must go
WORST = 3  # samples of a skipped step that each worker names


@dataclass(frozen=True)
class Work:
    """What is trained on what, where its checkpoints go, and who watches."""

    task: Task
    source: Source
    held: Source | None  # held-out samples
    checkpoints: Checkpoints
    watcher: Watcher
    far: FarSheets | None = None  # who draws where weights lie in shards


class Going(UserError):
    """The process was told to go, and has saved."""


def fit(engine: Engine, context: Context, work: Work, recipe: Recipe) -> dict[str, Any]:
    """Train until the recipe's steps are done or its minutes are over.

    Returns:
        What `Journal.facts` says, and resumed_from (step or None).

    Raises:
        UserError: checkpoints of other data; too many steps skipped; data or checkpoints that
            cannot be read or written; the process was told to go.
    """
    loop = _Loop(engine, context, work, recipe)
    resumed_from = loop.restore()
    try:
        loop.run()
    finally:
        loop.saver.close()
        work.watcher.close()
    return loop.journal.facts() | {"resumed_from": resumed_from}


def rate(recipe: Recipe, step: int, fraction: float) -> float:
    """Learning rate of a step: linear warm-up, then constant or a cosine down to 0.

    Args:
        recipe: gives lr, warmup and schedule.
        step: from 0.
        fraction: of the training that is over, 0 .. 1.
    """
    warm = min(1.0, (step + 1) / max(1, recipe.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, fraction))) if recipe.schedule == "cosine" else 1
    return recipe.lr * warm * fall


class _Loop:
    """One life of one worker."""

    def __init__(self, engine: Engine, context: Context, work: Work, recipe: Recipe) -> None:
        self.engine, self.context, self.work, self.recipe = engine, context, work, recipe
        self.journal = Journal(recipe)
        self.saver = Saver(work.checkpoints, context.rank, context.world_size)
        self.clock = _Clock(recipe, 0.0)
        self.passes = passes(recipe.batch, context.world_size, recipe.micro_batch)
        self.saved = (-1, 0.0)  # step and seconds of the last checkpoint
        self.looked = 0.0
        self.held: Batch | None = None

    def restore(self) -> int | None:
        """Go on from the newest whole checkpoint; its step."""
        found = _newest(self.context, self.work.checkpoints)
        if found is None:
            self.work.watcher.open(0)
            return None
        _same_data(found.facts["data"], self.work.source.digest)
        with self.work.checkpoints.fetch(found) as folder:
            self.engine.load(Stored(folder))
            history, skips = ((folder / name).read_text() for name in (HISTORY, SKIPPED))
        self.journal.resume(found.facts, history, skips)
        self.clock = _Clock(self.recipe, self.journal.seconds)
        self.saved = (self.journal.step, self.journal.seconds)
        self.work.watcher.open(self.journal.step)
        return self.journal.step

    def run(self) -> None:
        """Steps, until it is over."""
        task, source = self.work.task, self.work.source
        with Ahead(task, source, self.context, self.recipe.batch, self.journal.step) as ahead:
            while True:
                batch, problem = ahead.take()
                self._agree(problem or self.saver.problem())
                if self.clock.fraction(self.journal.step) >= 1.0:
                    break
                self._step(batch, ahead.waited)
        self.journal.seconds = max(self.journal.seconds, self.clock.agreed)
        if self.saved[0] != self.journal.step:
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
        now = self.clock.seconds() if self.context.rank == 0 else 0.0
        seconds, failed = self.context.total([now, float(bool(problem))])
        self.clock.agreed = seconds
        if failed:
            said = [words for words in self.context.words(problem) if words]
            raise UserError(said[0])
        if seconds - self.looked >= NOTICE_S:
            self.looked = seconds
            if self.context.total([float(self.context.leaving())])[0]:
                self._leave()

    def _step(self, batch: Batch, waited: float) -> None:
        lr = rate(self.recipe, self.journal.step, self.clock.fraction(self.journal.step))
        most = self.journal.most()
        made = self.engine.step(split(batch, self.passes), lr, most)
        if not made.applied:
            self.journal.skip(made.loss, most, self.context.words(_worst(batch, made)))
            if self.context.rank == 0:
                self.work.checkpoints.show(SKIPPED, self.journal.tables()[SKIPPED])
        self.journal.note(made.loss, made.applied, lr, self.clock.seconds())
        watcher = self.work.watcher
        watcher.step(batch, made, self.recipe.batch, waited)
        if self.journal.step % self.recipe.log_every == 0:
            values = {"loss": self.journal.loss, "lr": lr, "gradient norm": made.norm}
            watcher.log(self.context, self.journal.step, values)
        self.context.tell(self._status())
        if self.recipe.sheet_every and self.journal.step % self.recipe.sheet_every == 0:
            self._picture()
        if self._due():
            self._save()

    def _due(self) -> bool:
        late = self.clock.agreed - self.saved[1] >= self.recipe.checkpoint_minutes * 60
        return late or self.journal.step % self.recipe.checkpoint_every == 0

    def _save(self) -> None:
        """A checkpoint of this step, written while training goes on."""
        lr = rate(self.recipe, self.journal.step, self.clock.fraction(self.journal.step))
        score = self._validate()
        if score is not None:
            self.journal.validated(score, lr)
            self.work.watcher.tell(self.journal.step, {"loss/held out": score})
        self._await()
        facts = {"data": self.work.source.digest, "score": score, **self.journal.state()}
        self.saver.begin(self.journal.step, self.engine.state(), self.journal.tables(), facts)
        self.saved = (self.journal.step, self.clock.agreed)
        self.work.watcher.flush()

    def _await(self) -> None:
        """Until what is being written stands, on all ranks.

        Raises:
            UserError: one of them failed.
        """
        problem = ""
        try:
            self.saver.wait()
        except UserError as error:
            problem = str(error)
        if self.context.total([float(bool(problem))])[0]:
            raise UserError(next(words for words in self.context.words(problem) if words))

    def _leave(self) -> None:
        """Save at once; who can, goes."""
        if self.saved[0] != self.journal.step:
            self._save()
        self._await()
        if self.context.world_size == 1 and self.context.leaving():
            raise Going(
                f"told to stop, and saved at step {self.journal.step}; the same command goes on."
            )

    def _validate(self) -> float | None:
        """The loss of some held-out samples, always the same ones, at the same noise."""
        if self.work.held is None or not self.recipe.validate:
            return None
        context, count = self.context, max(self.recipe.validate, self.context.world_size)
        if self.held is None:
            samples = share(0, count, context.rank, context.world_size)
            self.held = self.work.task.draw(self.work.held.batch(samples))
        losses = [
            self.engine.losses(piece.batch)[: piece.real]
            for piece in split(self.held, passes(count, context.world_size, self._held_size()))
        ]
        total = self.context.total([float(torch.cat(losses).double().sum())])[0]
        return number(total / count)

    def _held_size(self) -> int:
        """How many held-out samples go in one pass: as many as of training."""
        share_ = -(-self.recipe.batch // self.context.world_size)
        return self.recipe.micro_batch or share_

    def _picture(self) -> None:
        """A sheet of samples, drawn by rank 0 while the others wait; shards go elsewhere."""
        if self.work.far is not None:
            if self.saved[0] != self.journal.step:
                self._save()
            if self.context.rank == 0:
                self.work.far.ask(self.journal.step)
            return
        if self.context.rank == 0:
            with self.engine.averaged():
                self.work.watcher.picture(self.journal.step, self.work.task, self._shown())
        self.context.total([0.0])

    def _shown(self) -> Source:
        """Where the samples of a sheet come from."""
        return self.work.held or self.work.source

    def _status(self) -> dict[str, Any]:
        """What the progress line shows."""
        journal, clock = self.journal, self.clock
        fraction, before = clock.fraction(journal.step), clock.fraction_at(*journal.began)
        spent = journal.seconds - journal.began[1]
        ahead = spent * (1 - fraction) / (fraction - before) if fraction > before else None
        shown = {"step": journal.step, "loss": number(journal.loss), "fraction": fraction}
        return shown | {"rate": journal.speed(), "eta_s": ahead}


class _Clock:
    """Training time, all sessions together; all ranks go by what rank 0's showed last."""

    def __init__(self, recipe: Recipe, before: float) -> None:
        self.recipe, self.before = recipe, before
        self.start, self.agreed = time.monotonic(), before

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def fraction(self, step: int) -> float:
        return self.fraction_at(step, self.agreed)

    def fraction_at(self, step: int, seconds: float) -> float:
        """How much of the training is over: by steps, or by time where that ends first."""
        limit = self.recipe.minutes * 60 if self.recipe.minutes is not None else math.inf
        done = seconds >= limit or step >= self.recipe.steps
        return 1.0 if done else max(step / self.recipe.steps, seconds / limit)


def _newest(context: Context, checkpoints: Checkpoints) -> Found | None:
    """The checkpoint to go on from; rank 0 looks, and takes the run over, all take what it found.

    Raises:
        UserError: the folder is another one on every node.
    """
    found, words = None, ""
    if context.rank == 0:
        checkpoints.claim()
        checkpoints.clear()
        found = checkpoints.newest()
        words = found.name if found else ""
    name = context.words(words)[0]
    checkpoints.check_shared()
    return checkpoints.named(name) if name else None


def _same_data(before: str, now: str) -> None:
    if before != now:
        raise UserError(
            f"the checkpoint was trained on other data (rows {before}, now {now}); give the data "
            f"it was trained on, or another out=, or remove its folder below .train to begin anew."
        )


def _worst(batch: Batch, made: Step) -> str:
    """The samples of this worker whose losses are not finite, or else the largest."""
    losses = made.losses.nan_to_num(math.inf, math.inf, math.inf)
    order = losses.argsort(descending=True)[:WORST].tolist()
    return " ".join(str(int(batch["sample"][i])) for i in order)
