"""Plain torch and DeepSpeed ZeRO 0-3: one seed, one curve; the moving average as published."""

import json
import math
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import toy
from torch import nn

from raylarge.train.context import LocalContext
from raylarge.train.engine import Average, DeepSpeedEngine, TorchEngine, deepspeed_config
from raylarge.train.ingest import Ingest
from raylarge.train.loop import rate
from raylarge.train.task import Recipe

RECIPE = Recipe(batch=8, lr=1e-2, clip=0.5, seed=3)
BAD_STEP = 2


def test_the_moving_average_is_the_published_one(parity):
    trace = json.loads((parity / "meta.json").read_text())["ema_trace_0_to_1"]
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = Average(module)
    module.weight.data.fill_(1.0)
    for expected in trace:
        average.update()
        assert average.whole()["weight"].item() == pytest.approx(expected, abs=1e-6)


def test_learning_rate():
    recipe = Recipe(lr=1.0, warmup=4, schedule="constant")
    assert [rate(recipe, step, 0.0) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    cosine = replace(recipe, schedule="cosine")
    assert [rate(cosine, 9, part) for part in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_deepspeed_json_is_derived():
    recipe = Recipe(batch=24, accumulation=3, zero=2, clip=0.7, precision="bf16")
    made = deepspeed_config(recipe, world_size=4)
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 3
    assert made["zero_optimization"]["stage"] == 2
    assert made["gradient_clipping"] == 0.7
    assert made["torch_autocast"]["enabled"]


class Peer(LocalContext):
    """One of several processes without Ray."""

    def __init__(self, rank=0, world_size=1):
        super().__init__("unused", 1, print)
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")


def curve(make, recipe, peer, data, steps=6, half_way=None):
    """Losses, weights and average after some steps, stopped and resumed half way on request."""
    ingest = Ingest(data, "latents-0", recipe)
    fresh = lambda: (torch.manual_seed(0), make(poisoned(ingest.facts), recipe, peer))[1]  # noqa: E731
    engine, losses = fresh(), []
    for step in range(steps):
        if half_way is not None and step == steps // 2:
            engine.save(half_way)
            torch.distributed.barrier()
            engine = fresh()
            engine.load(half_way)
        batch = ingest.batch(step, peer.rank, peer.world_size)
        size = len(batch["sample"]) // recipe.accumulation
        pieces = [
            {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
            for i in range(recipe.accumulation)
        ]
        losses.append(engine.step(pieces, recipe.lr))
    return losses, engine.weights(), engine.average()


def poisoned(facts):
    """The toy; one sample of one step has a loss that is not finite."""
    return toy.Toy(poison=(BAD_STEP * RECIPE.batch + 5,))(None, facts)


def two_workers(rank, port, data, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    run = partial(curve, peer=Peer(rank, 2), data=data)
    curves = {"torch": run(TorchEngine, RECIPE)}
    accumulated = replace(RECIPE, accumulation=2)
    curves["torch in 2 pieces"] = run(TorchEngine, accumulated)
    for zero in range(4):
        recipe = replace(RECIPE, zero=zero)
        half_way = Path(out, f"zero-{zero}")
        half_way.mkdir(exist_ok=True)
        curves[f"zero {zero}, resumed"] = run(DeepSpeedEngine, recipe, half_way=half_way)
    curves["zero 2 in 2 pieces"] = run(DeepSpeedEngine, replace(accumulated, zero=2))
    half = replace(RECIPE, precision="bf16")
    curves["torch bf16"] = run(TorchEngine, half)
    curves["zero 1 bf16"] = run(DeepSpeedEngine, half)
    if rank == 0:
        torch.save(curves, Path(out, "curves.pt"))


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    data = str(tmp_path_factory.mktemp("data"))
    toy.write_latents(data)
    out = tmp_path_factory.mktemp("out")
    port = 20000 + os.getpid() % 20000
    torch.multiprocessing.spawn(two_workers, (port, data, str(out)), nprocs=2)
    found = torch.load(out / "curves.pt")
    return found | {"alone": curve(TorchEngine, RECIPE, Peer(), data)}


@pytest.mark.parametrize(
    "name",
    ["torch", "torch in 2 pieces", "zero 2 in 2 pieces"]
    + [f"zero {zero}, resumed" for zero in range(4)],
)
def test_engines_agree(curves, name):
    losses, weights, average = curves[name]
    expected_losses, expected_weights, expected_average = curves["alone"]
    assert math.isnan(losses[BAD_STEP])
    assert losses == pytest.approx(expected_losses, abs=1e-6, nan_ok=True)
    torch.testing.assert_close(weights, expected_weights, atol=1e-5, rtol=0)
    torch.testing.assert_close(average, expected_average, atol=1e-5, rtol=0)


def test_bf16_is_autocast_in_both(curves):
    losses, weights, _ = curves["zero 1 bf16"]
    assert losses == pytest.approx(curves["torch bf16"][0], rel=1e-2, nan_ok=True)
    assert losses != curves["zero 1, resumed"][0]
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_a_skipped_step_leaves_the_weights_alone(tmp_path):
    toy.write_latents(tmp_path)
    ingest = Ingest(str(tmp_path), "latents-0", RECIPE)
    engine = TorchEngine(toy.Toy(poison=(0,))(None, ingest.facts), RECIPE, Peer())
    before = engine.weights()
    assert math.isnan(engine.step([ingest.batch(0)], lr=1e-2))
    torch.testing.assert_close(engine.weights(), before, atol=0, rtol=0)
    assert math.isfinite(engine.step([ingest.batch(1)], lr=1e-2))
