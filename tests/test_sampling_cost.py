"""The price of a plan is what its workers are really asked."""

import base64
import dataclasses

import numpy as np
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack as modes

from raylarge import images
from raylarge import order as orders
from raylarge.models import bundle as bundles
from raylarge.models import controlnet
from raylarge.models.autoencoder import Autoencoder
from raylarge.models.cost import CallCounts
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.models.prior import GridPrior
from raylarge.order import Condition
from raylarge.sampling import cost, joint
from raylarge.sampling.plan import run
from raylarge.workers.worker import Worker


def png(side):
    """The base64 of a grey PNG."""
    return base64.b64encode(images.png_bytes(np.full((side, side, 3), 90, np.uint8))).decode()


SOURCE = {"image": png(64), "octaves": 1}
VECTOR = Condition.of_vector(np.eye(5, dtype=np.float32)[0]).plain()
GRID = Condition.of(np.ones((2, 3, 8), np.float16)).plain()


@pytest.mark.parametrize(
    "values",
    [
        {"count": 3},
        {"size": "128x192"},
        {"size": "128x192", "condition": {"kind": "cdm", "fine": "independent"}},
        {"size": 128, "condition": {"kind": "cdm", "fine": "inversion", "iterations": 3}},
        {"size": 128, "condition": {"kind": "cdm", "fine": "prior", "prior_steps": 4}},
        {"size": 128, "condition": {**VECTOR, "prior_guidance": 2.0, "prior_steps": 4}},
        {"size": 128, "algorithm": "superres", "source": SOURCE},
        {"size": 128, "algorithm": "superres", "source": {**SOURCE, "control": True}},
        {
            "size": 256,
            "algorithm": "superres",
            "source": {**SOURCE, "image": png(128)},
            "condition": {"kind": "inverted", "iterations": 2},
        },
        {"size": "128x192", "condition": GRID, "sampler": {"steps": 2, "corrections": 2}},
        {"size": 256, "levels": "2,1,0", "sampler": {"steps": 2}},
        {"size": "128x192", "refine": True, "sampler": {"steps": 2}},
        {"size": "128x160", "algorithm": "strided", "sampler": {"steps": 2}},
        {"size": "128x192", "algorithm": "strided", "condition": GRID, "sampler": {"steps": 2}},
        {"size": 128, "sampler": {"steps": 2, "derivative": "difference"}},
        {"size": "128x192", "sampler": {"steps": 2, "corrections": 2, "constraint": "mosaic"}},
        {
            "size": "128x192",
            "condition": GRID,
            "sampler": {"correct_every": 2, "interval": [0.2, 0.7]},
        },
        {"size": 128, "sampler": {"steps": 2, "small_autoencoder": True}},
        {"size": 128, "sampler": {"steps": 2, "correction": "backprop"}},
        {
            "size": "128x192",
            "sampler": {"steps": 2, "constraint": "mosaic", "small_autoencoder": True},
        },
        {"count": 2, "sampler": {"steps": 4, "solver": "plms"}},
        {"count": 2, "sampler": {"steps": 4, "solver": "dpm++"}},
        {"count": 2, "sampler": {"steps": 4, "solver": "unipc"}},
    ],
)
def test_every_evaluation_is_counted(tiny_bundle, values, one_thread):
    """Windows that pass through each network, forward-mode ones twice, against the price.

    The backward pass of an inversion counts as one more.
    """
    plain = bundles.load(tiny_bundle)
    bundle = dataclasses.replace(
        plain,
        prior=GridPrior(channels=8, vector=5, width=16, blocks=1),
        controlnet=controlnet.build(plain.unet, plain.patch.factor).eval(),
        vae_small=Autoencoder(LightAutoencoder(width=8, blocks=1)),
    )
    worker = Worker(bundle)
    order = orders.parse({"batch": 4, "sampler": {"steps": 3}, **values})
    seen = dataclasses.asdict(CallCounts())

    def counted(name, call):
        def counting(x, *rest, **more):
            linearized = any(type(mode).__name__ == "_Tape" for mode in modes())
            twice = linearized or torch.is_grad_enabled()
            seen[name] += len(x) * (2 if twice else 1)
            return call(x, *rest, **more)

        return counting

    vae = worker.bundle.vae
    vae.encode, vae.decode = counted("encode", vae.encode), counted("decode", vae.decode)
    small = bundle.vae_small
    small.encode = counted("small_encode", small.encode)
    small.decode = counted("small_decode", small.decode)
    bundle.unet.forward = counted("unet", bundle.unet.forward)
    bundle.cdm.forward = counted("cdm", bundle.cdm.forward)
    bundle.controlnet.forward = counted("control", bundle.controlnet.forward)
    bundle.prior.register_forward_hook(
        lambda _, given, made: seen.update(prior=seen["prior"] + made[:, 0].numel())
    )
    plan = joint.plan(order, worker.bundle.patch)
    run(plan, worker.answer)
    assert seen == dataclasses.asdict(cost.count_calls(plan, order, bundle.patch))
