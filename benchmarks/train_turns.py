"""Trainings that take turns: some steps of one, of the next, and around again.

    conduct (this process) <-socket-> contenders: each one training, in processes of its own

All are set up and warm before a turn counts, and one computes at a time, so that whatever else
the machine does falls on all alike. The network of each tells the time before each of its
passes, so a step is all that the loop does from one pass to the next.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from raylarge.train.launch import Train, train
from raylarge.train.task import Batch, Facts, Task
from raylarge.train.tasks import ldm

LOOK_S = 1.0
LOOPS = ("bare", "bare, making its batches")


@dataclass(frozen=True)
class Way:
    """A contender: a training by a config, or (one of LOOPS) by a loop of plain torch."""

    name: str
    config: Train
    loop: str = ""


@dataclass
class Found:
    """What the turns gave.

    Attributes:
        seconds: by way, wall and CPU seconds of each step, [turns, steps, 2].
        facts: by way, what its training said.
        beside: by name, cores that other processes of ours took: Ray's, and drivers.
        load: load averages of a minute, at the start and at the end.
    """

    seconds: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    beside: dict[str, float] = field(default_factory=dict)
    load: tuple[float, float] = (0.0, 0.0)


class Gate:
    """Where a contender waits for its turn, and tells what the last one took."""

    def __init__(self, path: str, name: str, turn: int) -> None:
        """Take the conductor's socket, who is waiting, and the steps of a turn."""
        self._path, self._name, self._turn = path, name, turn
        self._connection: Connection | None = None
        self._stamps: list[tuple[float, float]] = []

    def before(self, step: int) -> bool:
        """Before the pass of a step; whether a turn begins with it.

        Turns begin in the middle of `turn` steps, so that a checkpoint after every `turn` steps
        lies in the middle of each. The first one is longer by that half.
        """
        self._stamps.append(now())
        if self._connection is None:
            self._connection = Client(self._path, "AF_UNIX")
            self._connection.send((self._name, os.getpid()))
        elif step >= length(self._turn, 1) and (step - self._turn // 2) % self._turn == 0:
            self._connection.send(self._stamps)
        else:
            return False
        self._connection.recv()  # EOFError: the conductor is gone, and so shall we be
        self.restart()
        return True

    def restart(self) -> None:
        """The turn begins now."""
        self._stamps = [now()]


@dataclass(frozen=True)
class Turns:
    """Makes the real task, whose first rank waits for its turn; travels to the workers."""

    path: str
    name: str
    turn: int

    def __call__(self, config: Train, facts: Facts) -> Task:
        """See `task.Build`."""
        torch.set_num_threads(1)
        task = silent(config, facts)
        gate = Gate(self.path, self.name, self.turn)

        def hook(_: nn.Module, inputs: tuple[Batch, ...]) -> None:
            step, rest = divmod(int(inputs[0]["sample"][0]), config.batch)
            if rest == 0:  # the share of rank 0
                gate.before(step)

        task.network.register_forward_pre_hook(hook)
        return task


def silent(config: Train, facts: Facts) -> Task:
    """The real task; it draws no sheet and writes no bundle."""
    task = ldm.build(config, facts)
    vars(task).update(sheet=_nothing, finish=_nothing)
    return task


def length(turn: int, turns: int) -> int:
    """The steps of the first turns."""
    return turn // 2 + turns * turn


def conduct(ways: Sequence[Way], turn: int, turns: int, address: str = "") -> Found:
    """Have contenders take turns, in a new order each time.

    Args:
        ways: who contends.
        turn: steps of a turn.
        turns: that count; one before is for warming up.
        address: of the Ray that their workers run in.
    """
    steps = length(turn, turns + 1) + 1
    found, order = Found(), random.Random(0)
    with tempfile.TemporaryDirectory(prefix="turns-") as folder, _pool(len(ways)) as pool:
        path = f"{folder}/socket"
        with ExitStack() as stack:  # who waits for a turn hears that we are gone
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(path)
            server.listen()
            server.settimeout(LOOK_S)
            jobs = [_prepared(way, steps, folder) for way in ways]
            futures = [pool.submit(_apart, one, path, turn, address) for one in jobs]
            lines, own = _accepted(server, futures, stack)
            blocks: dict[str, list[np.ndarray]] = {way.name: [] for way in ways}
            for number in range(turns + 1):
                if number == 1:
                    began, spent, load = time.monotonic(), _others(own), os.getloadavg()[0]
                for name in order.sample(sorted(lines), len(lines)):
                    lines[name].send("go")
                    blocks[name].append(np.diff(_heard(lines[name], futures), axis=0))
            found.beside = _cores(spent, _others(own), time.monotonic() - began)
            found.load = (load, os.getloadavg()[0])
            for line in lines.values():
                line.send("end")
            answers = [future.result() for future in futures]
    found.seconds = {name: np.stack(some[1:]) for name, some in blocks.items()}
    found.facts = {way.name: answer for way, answer in zip(ways, answers, strict=True)}
    return found


def contend(way: Way, path: str, turn: int) -> dict[str, Any]:
    """One contender; what its training says."""
    if way.loop:
        return bare(way, Gate(path, way.name, turn), turn)
    return train(way.config, Turns(path, way.name, turn))


def _apart(way: Way, path: str, turn: int, address: str) -> dict[str, Any]:
    """A contender in a process of its own."""
    torch.set_num_threads(1)
    if address:
        os.environ["RAY_ADDRESS"] = address
    log = os.open(f"{way.config.logs}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    return contend(way, path, turn)


def bare(way: Way, gate: Gate, turn: int) -> dict[str, Any]:
    """What nobody can leave out: forward, backward, clipping, AdamW, the average; plain torch.

    The batches are made before a turn begins or, by the second of LOOPS, each in its step.
    """
    config, made = way.config, []
    source = ldm.source(config)
    task = ldm.build(config, source.facts)
    network, facts = task.network.train(), {}
    averaged = list(task.averaged.parameters())
    options = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(network.parameters(), **options)
    shadow = [parameter.detach().clone() for parameter in averaged]

    def batch(step: int) -> Batch:
        return task.draw(source.batch(range(step * config.batch, (step + 1) * config.batch)))

    for step in range(config.steps):
        if gate.before(step) and way.loop == LOOPS[0]:
            made = [batch(step + i) for i in range(length(turn, 1) if step == 0 else turn)]
            gate.restart()
        loss = network(made.pop(0) if made else batch(step)).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(0.9999, (2 + step) / (11 + step))
            torch._foreach_lerp_(shadow, averaged, 1 - decay)
        value = loss.item()
        facts.setdefault("first_loss", value)
        facts["loss"] = 0.98 * facts.get("loss", value) + 0.02 * value
    return facts


def _prepared(way: Way, steps: int, folder: str) -> Way:
    """A way whose training ends with the last turn, and whose files lie in a folder."""
    name = "".join(letter if letter.isalnum() else "-" for letter in way.name)
    out, logs = Path(folder, f"{name}-out"), Path(folder, f"{name}-logs")
    return replace(way, config=replace(way.config, steps=steps, out=str(out), logs=str(logs)))


def _accepted(
    server: socket.socket, futures: Sequence[Future[Any]], stack: ExitStack
) -> tuple[dict[str, Connection], set[int]]:
    """Lines to all contenders by name, and the processes at their ends."""
    lines: dict[str, Connection] = {}
    pids = set()
    while len(lines) < len(futures):
        try:
            accepted, _ = server.accept()
        except TimeoutError:
            _check(futures)
            continue
        line = stack.enter_context(Connection(accepted.detach()))
        name, pid = _heard(line, futures)
        lines[name] = line
        pids.add(pid)
    return lines, pids


def _heard(line: Connection, futures: Sequence[Future[Any]]) -> Any:
    """What a contender says, as long as all are there."""
    while not line.poll(LOOK_S):
        _check(futures)
    return line.recv()


def _check(futures: Sequence[Future[Any]]) -> None:
    """Say it if a contender has ended before its time."""
    for future in futures:
        if future.done():
            raise AssertionError(f"a contender ended before its time: {future.result()}")


def _others(own: set[int]) -> dict[tuple[int, str], float]:
    """CPU seconds of each process below this one but those that train."""
    spent = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            words, times = process.cmdline(), process.cpu_times()
            if process.pid not in own and words:
                spent[process.pid, _named(words)] = times.user + times.system
    return spent


def _named(words: Sequence[str]) -> str:
    """A process by what it runs."""
    if "multiprocessing" in " ".join(words):
        return "driver"
    files = [Path(word).name for word in words[:4] if word.endswith(".py")]
    return files[0] if files else Path(words[0].split()[0]).name


def _cores(
    before: dict[tuple[int, str], float], after: dict[tuple[int, str], float], seconds: float
) -> dict[str, float]:
    """Cores by name that processes took between two looks; those that ended do not count."""
    found: dict[str, float] = defaultdict(float)
    for key, spent in after.items():
        found[key[1]] += (spent - before.get(key, 0.0)) / seconds
    return dict(found)


def _pool(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def now() -> tuple[float, float]:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def _nothing(*_: Any) -> None:
    return None
