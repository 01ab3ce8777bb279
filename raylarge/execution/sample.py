"""sample: one order carried out, here or on Ray actors, and its files written.

The verb's engine stands in the fleet and not above it because it is the fleet at work: a
plan, workers, a ledger. Killed and run again, the same command goes on where it stopped.

    OUT/image.png  guide.png  order.json  report.json    (OUT/.ledger-* while it runs)
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from raylarge import report, storage
from raylarge.compute.config import ComputeConfig
from raylarge.compute.session import session
from raylarge.execution import result
from raylarge.execution.config import SampleConfig
from raylarge.execution.output import Output
from raylarge.execution.sample_order import read_order
from raylarge.models import bundle as bundles
from raylarge.models import cost
from raylarge.order import Order
from raylarge.sampling import joint
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.cost import count_calls
from raylarge.sampling.plan import Plan, arun, run
from raylarge.sampling.tasks import Task
from raylarge.workers.worker import Worker

NETWORKS = (
    *("U-Net", "decoder", "encoder", "CDM", "grid prior (per cell)", "ControlNet"),
    *("small decoder", "small encoder"),
)
"""The networks of `cost.CallCounts`, in its order."""
VERSIONS = ("raylarge", "torch", "diffusers", "ray")


def sample(config: SampleConfig, log: report.Report) -> dict[str, str]:
    """Carry out the order, unless its image is there already; file name -> path.

    Raises:
        UserError: no bundle, an order or a reference that does not fit, lost workers.
    """
    compute = config.compute
    folder = storage.absolute(config.bundle)
    facts = BundleFacts.read(folder)
    order, region = read_order(config, facts.patch)
    plan = joint.plan(order, facts.patch)
    facts.check(order)
    if region:
        report.say(f"reference: {region}")
    if config.dry_run:
        _say_price(config, folder, order, plan)
        return {}
    output = Output(storage.absolute(config.out), order, facts.digest, compute.name)
    storage.require_writable("out", output.folder)
    with storage.exclusive(output.folder, "sample"):
        log.read()
        replaced = output.replaced(log.facts, config.overwrite)
        if (files := output.finished(log.facts)) and not replaced:
            report.say("this order was carried out before; nothing is left to do")
            return files
        carry_out = _on_ray if config.workers else _here
        this = _Run(compute, output, facts, plan, log, replaced)
        if region:
            log.facts["reference"] = region.facts
        return carry_out(config, folder, this)


def _say_price(config: SampleConfig, folder: str, order: Order, plan: Plan) -> None:
    """Print requests, evaluations, FLOPs and GPU-seconds of an order."""
    bundle = bundles.load(folder)
    counted = count_calls(plan, order, bundle.patch)
    costs = cost.bundle_flops(bundle)
    here = _seconds_here(config, bundle, counted, costs)
    named = zip(NETWORKS, dataclasses.astuple(counted), strict=True)
    rows = [
        ["requests", len(plan.requests)],
        *([f"{name} evaluations", count] for name, count in named if count),
        ["PFLOP", f"{cost.total_flops(counted, costs) / 1e15:.4g}"],
        [
            f"GPU-seconds at {config.tflops:g} TFLOP/s",
            f"{cost.seconds(counted, costs, config.tflops):.4g}",
        ],
        [f"expected on this machine, {max(1, config.workers)} worker(s)", f"{here:.4g} s"],
    ]
    report.say(report.table(["what", "how much"], rows))


def _seconds_here(
    config: SampleConfig, bundle: bundles.Bundle, counted: cost.CallCounts, costs: cost.CallFlops
) -> float:
    """Expected seconds on this machine's CPU, by a few timed evaluations of the U-Net."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        tflops = cost.measured_tflops(bundle, costs)
    finally:
        torch.set_num_threads(before)
    cores = os.cpu_count() or 1
    at_once = min(max(1, config.workers), max(1, cores // config.threads))
    return cost.seconds(counted, costs, tflops * at_once)


class _Run:
    """An order under way: its plan, as far as an earlier run has brought it, and its ledger."""

    def __init__(
        self,
        compute: ComputeConfig,
        output: Output,
        facts: BundleFacts,
        plan: Plan,
        log: report.Report,
        replaced: list[str],
    ) -> None:
        self.compute, self.output, self.replaced = compute, output, replaced
        self.order, self.facts, self.plan, self.log = output.order, facts, plan, log
        log.facts = {"stages": {}, **output.facts}
        self.ledger = output.ledger
        self.resumed = self.ledger.resume(plan)
        self.phases: dict[str, float] = {}
        self.costs: cost.CallFlops | None = None

    @contextmanager
    def watched(self) -> Iterator[Callable[[Plan], None]]:
        """What to call after each reply: it moves the bar (the ledger keeps the reply itself)."""
        total = len(self.plan.requests)
        bar = report.progress(None, "sample", total=total, initial=self.resumed, unit="request")

        def watch(plan: Plan) -> None:
            bar.update()

        with self.log.stage("sample") as facts, bar:
            yield watch
            facts.update(requests=bar.n - self.resumed, resumed=self.resumed)

    def timed(self, task: Task, began: float) -> None:
        """Add what a request took to its kind's seconds."""
        name = type(task).__name__
        self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - began

    def work(self) -> dict[str, Any]:
        """Return network evaluations, FLOPs, the rate that was reached, and the peak memory."""
        counted = count_calls(self.plan, self.order, self.facts.patch)
        facts: dict[str, Any] = {"evaluations": dataclasses.asdict(counted)}
        facts["phases_s"] = {name: round(spent, 3) for name, spent in self.phases.items()}
        facts["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            facts["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
        if self.costs is not None:
            facts["flops"] = cost.total_flops(counted, self.costs)
            if not self.resumed:
                seconds = self.log.facts["stages"]["sample"]["seconds"]
                facts["tflops_reached"] = facts["flops"] / 1e12 / max(seconds, 1e-9)
        return facts

    def write(self, image: Any) -> dict[str, str]:
        """Write the files, then the report; then the ledger has had its use."""
        self.output.remove(self.replaced)
        with self.log.stage("write"):
            job = self.order, self.facts, image
            files, measured = result.write(self.output.folder, *job, pyramid=True)
        self.log.add(
            seed=self.order.seed,
            versions={name: version(name) for name in VERSIONS},
            files=sorted(files),
            **self.work(),
            **measured,
            meaning={name: result.MEANING[name] for name in measured},
        )
        self.ledger.remove()
        return files


def _here(config: SampleConfig, folder: str, this: _Run) -> dict[str, str]:
    """The local twin: one worker in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with this.log.stage("start"):
            worker = Worker.opened(folder, this.compute)
            this.costs = cost.bundle_flops(worker.bundle)

        def answer(task: Task, **inputs: Any) -> Any:
            began = time.monotonic()
            reply = worker.answer(task, **inputs)
            this.timed(task, began)
            return reply

        with this.watched() as watch:
            image = run(this.plan, answer, watch)
        return this.write(image)
    finally:
        torch.set_num_threads(before)


def _on_ray(config: SampleConfig, folder: str, this: _Run) -> dict[str, str]:
    """Actors on the cluster that RAY_ADDRESS names, or on a Ray of our own."""
    with session(config.workers * config.threads):
        return asyncio.run(_many(config, folder, this))


async def _many(config: SampleConfig, folder: str, this: _Run) -> dict[str, str]:
    from raylarge.workers.pool import ActorPool  # knows Ray, which workers=0 does without

    pool = ActorPool(folder, config.workers, this.compute)
    try:
        with this.log.stage("start"):
            await pool.start()

        async def answer(task: Task, **inputs: Any) -> Any:
            began = time.monotonic()
            reply = await pool.answer(task, **inputs)
            this.timed(task, began)
            return reply

        with this.watched() as watch:
            image = await arun(this.plan, answer, watch, most=2 * config.workers)
        return this.write(image)
    finally:
        await pool.shut_down()
