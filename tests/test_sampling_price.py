"""The price of a plan is what its workers are really asked."""

import dataclasses

import numpy as np
import pytest
import torch

from raylarge import order as orders
from raylarge.fleet.worker import Worker
from raylarge.models import bundle as bundles
from raylarge.order import Condition
from raylarge.sampling import joint, price
from raylarge.sampling.plan import run

GRID = dataclasses.asdict(Condition.of(np.ones((2, 3, 8), np.float16)))


@pytest.mark.parametrize(
    "values",
    [
        {"count": 3},
        {"size": "128x192"},
        {"size": "128x192", "condition": {"kind": "cdm", "fine": "independent"}},
        {"size": "128x192", "condition": GRID, "sampler": {"steps": 2, "inner": 2}},
        {"size": 256, "levels": "2,1,0", "sampler": {"steps": 2}},
        {"size": "128x192", "refine": True, "sampler": {"steps": 2}},
        {"size": "128x160", "algorithm": "strided", "sampler": {"steps": 2}},
        {"size": "128x192", "algorithm": "strided", "condition": GRID, "sampler": {"steps": 2}},
        {"size": 128, "sampler": {"steps": 2, "derivative": "difference"}},
        {"size": "128x192", "sampler": {"steps": 2, "inner": 2, "constraint": "mosaic"}},
        {"count": 2, "sampler": {"steps": 4, "solver": "plms"}},
        {"count": 2, "sampler": {"steps": 4, "solver": "dpm++"}},
        {"count": 2, "sampler": {"steps": 4, "solver": "unipc"}},
    ],
)
def test_every_evaluation_is_counted(tiny_bundle, values, one_thread):
    """Windows that pass through each network, forward-mode ones twice, against the price."""
    worker = Worker(bundles.load(tiny_bundle))
    order = orders.parse({"batch": 4, "sampler": {"steps": 3}, **values})
    seen = {"unet": 0, "decode": 0, "encode": 0}

    def counted(name, call):
        def counting(x, *rest):
            level = torch._C._functorch.maybe_current_level()
            seen[name] += len(x) * (2 if level is not None else 1)
            return call(x, *rest)

        return counting

    vae = worker.bundle.vae
    vae.encode, vae.decode = counted("encode", vae.encode), counted("decode", vae.decode)
    worker._denoiser.unet = counted("unet", worker._denoiser.unet)
    worker._told_late.unet = counted("unet", worker._told_late.unet)
    plan = joint.plan(order, worker.bundle.patch)
    run(plan, worker.answer)
    assert seen == dataclasses.asdict(price.counts(plan, order, worker.bundle.patch))
