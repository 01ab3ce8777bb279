"""Plain torch and DeepSpeed ZeRO 0-3: one seed, one curve; whole states that anybody takes up."""

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

from raylarge.train.budget import rate
from raylarge.train.context import LocalContext
from raylarge.train.deepspeed_engine import DeepSpeedEngine, deepspeed_config
from raylarge.train.ema import EMA
from raylarge.train.ingest import Ingest, share
from raylarge.train.micro_batches import passes, split
from raylarge.train.state import StoredState
from raylarge.train.task import Recipe
from raylarge.train.torch_engine import TorchEngine

RECIPE = Recipe(batch=8, lr=1e-2, clip=0.5, seed=3)
BAD_STEP, SPIKE_STEP = 2, 4
STEPS = 6


def test_the_moving_average_is_the_published_one(parity):
    trace = json.loads((parity / "meta.json").read_text())["ema_trace_0_to_1"]
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = EMA(module)
    module.weight.data.fill_(1.0)
    for expected in trace:
        average.update()
        assert average.whole()["weight"].item() == pytest.approx(expected, abs=1e-6)
    with average.in_place():
        assert module.weight.item() == pytest.approx(trace[-1], abs=1e-6)
    assert module.weight.item() == 1.0


def test_learning_rate():
    recipe = Recipe(lr=1.0, warmup=4, schedule="constant")
    assert [rate(recipe, step, 0.0) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    cosine = replace(recipe, schedule="cosine")
    assert [rate(cosine, 9, part) for part in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


def test_deepspeed_json_is_derived():
    recipe = Recipe(batch=24, micro_batch=2, zero=2, clip=0.7, precision="bf16", offload=True)
    made = deepspeed_config(recipe, world_size=4)
    assert made["gradient_accumulation_steps"] == 3
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert made["gradient_clipping"] == 0.7
    assert made["torch_autocast"]["enabled"]
    assert "offload_optimizer" not in deepspeed_config(Recipe(), 1)["zero_optimization"]


@pytest.mark.parametrize(("size", "count"), [(5, 2), (2, 3), (1, 1), (7, 7)])
def test_passes_hold_every_sample_once(size, count):
    batch = {"sample": torch.arange(size), "x": torch.rand(size, 2)}
    pieces = split(batch, count)
    assert len(pieces) == count
    assert torch.cat([piece.batch["sample"][: piece.real] for piece in pieces]).tolist() == list(
        range(size)
    )
    assert all(len(piece.batch["x"]) >= 1 for piece in pieces)


class Peer(LocalContext):
    """One of several processes without Ray."""

    def __init__(self, rank=0, world_size=1):
        super().__init__(print)
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")

    def all_reduce_sum(self, values):
        if self.world_size == 1:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(message)
        return message.tolist()


def fresh(make, recipe, peer, ingest):
    torch.manual_seed(0)
    return make(poisoned(ingest.facts), recipe, peer)


def curve(make, recipe, peer, data, start=0, store=None, load=None, worn=False):
    """Losses, weights and average; on request from a stored state, or storing one half way."""
    ingest = Ingest(data, {"latents-0": ("latent", "grid")}, recipe)
    engine, losses = fresh(make, recipe, peer, ingest), []
    if load is not None:
        if worn:  # what was trained otherwise before is gone
            engine.step(split(ingest.batch(range(8)), 1), 1.0, math.inf)
        engine.load(StoredState(load))
    for step in range(start, STEPS):
        if store is not None and step == STEPS // 2:
            engine.state().write(store, peer.rank)
        batch = ingest.batch(share(step, recipe.batch, peer.rank, peer.world_size))
        count = passes(recipe.batch, peer.world_size, recipe.micro_batch)
        most = 1e-3 if step == SPIKE_STEP else math.inf
        made = engine.step(split(batch, count), recipe.lr, most)
        assert len(made.losses) == len(batch["sample"])
        losses.append(made.loss if made.applied else math.nan)
    average = engine.average()
    with engine.whole():
        weights = {k: v.detach().clone() for k, v in engine.network.state_dict().items()}
    return losses, weights, average


def poisoned(facts):
    """The toy; one sample of one step has a loss that is not finite."""
    return toy.Toy(poison=(BAD_STEP * RECIPE.batch + 5,))(None, facts)


def workers(rank, world_size, port, data, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    run = partial(curve, peer=Peer(rank, world_size), data=data)
    curves = {}
    for name, make, recipe in variants():
        folder = Path(out, f"{name} on {world_size}")
        folder.mkdir(exist_ok=True)
        curves[name] = run(make, recipe, store=folder)
    torch.distributed.barrier()
    if world_size == 2:  # everybody goes on from what others left
        for name, make, recipe in list(variants())[:WHOLE]:
            for left in ("torch on 1", "zero 2 on 2", "zero 3 on 2"):
                folder = Path(out, left)
                some = {"start": STEPS // 2, "load": folder, "worn": left == "torch on 1"}
                curves[f"{name} from {left}"] = run(make, recipe, **some)
    if rank == 0:
        torch.save(curves, Path(out, f"curves-{world_size}.pt"))
    torch.distributed.barrier()


def variants():
    yield "torch", TorchEngine, RECIPE
    for zero in range(4):
        yield f"zero {zero}", DeepSpeedEngine, replace(RECIPE, zero=zero)
    uneven = replace(RECIPE, micro_batch=3)
    yield "torch in passes of 3", TorchEngine, uneven
    yield "zero 2 in passes of 3", DeepSpeedEngine, replace(uneven, zero=2)


NAMES = [name for name, _, _ in variants()]
WHOLE = 5  # of the variants make their share in one pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    toy.write_latents(folder)
    return folder


@pytest.fixture(scope="module")
def curves(data, tmp_path_factory):
    """Curves of one worker, of two, and of three, whose shares are not of one size."""
    out = tmp_path_factory.mktemp("out")
    (out / "torch on 1").mkdir()
    found = {"alone": curve(TorchEngine, RECIPE, Peer(), data, store=out / "torch on 1")}
    for world_size in (2, 3):
        port = 20000 + (os.getpid() + world_size) % 20000
        arguments = (world_size, port, data, str(out))
        torch.multiprocessing.spawn(workers, arguments, nprocs=world_size)
        made = torch.load(out / f"curves-{world_size}.pt")
        found |= {f"{name} on {world_size}": its for name, its in made.items()}
    found["alone from zero 3 on 3"] = curve(
        TorchEngine, RECIPE, Peer(), data, start=STEPS // 2, load=out / "zero 3 on 3"
    )
    return found


LATENTS = {"latents-0": ("latent", "grid")}


def assert_alike(found, expected):
    losses, weights, average = found
    assert losses == pytest.approx(expected[0][-len(losses) :], abs=1e-6, nan_ok=True)
    torch.testing.assert_close(weights, expected[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(average, expected[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_engines_and_world_sizes_agree(curves, name, world_size):
    assert math.isnan(curves["alone"][0][BAD_STEP])
    assert math.isnan(curves["alone"][0][SPIKE_STEP])
    assert_alike(curves[f"{name} on {world_size}"], curves["alone"])


@pytest.mark.parametrize("name", NAMES[:WHOLE])
@pytest.mark.parametrize("left", ["torch on 1", "zero 2 on 2", "zero 3 on 2"])
def test_any_engine_goes_on_from_any_other(curves, name, left):
    assert_alike(curves[f"{name} from {left} on 2"], curves["alone"])


def test_one_worker_goes_on_from_three(curves):
    assert_alike(curves["alone from zero 3 on 3"], curves["alone"])


def test_bf16_is_autocast(data):
    half = replace(RECIPE, precision="bf16")
    (losses, weights, _), (exact, _, _) = (
        curve(TorchEngine, recipe, Peer(), data) for recipe in (half, RECIPE)
    )
    assert losses == pytest.approx(exact, rel=2e-2, nan_ok=True)
    assert losses != exact
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_a_skipped_step_leaves_the_weights_alone(data):
    ingest = Ingest(data, LATENTS, RECIPE)
    engine = TorchEngine(toy.Toy(poison=(0,))(None, ingest.facts), RECIPE, Peer())
    before = {name: value.clone() for name, value in engine.network.state_dict().items()}
    for most in (math.inf, 1e-9):
        made = engine.step(split(ingest.batch(range(8)), 1), 1e-2, most)
        assert not made.applied
        torch.testing.assert_close(engine.network.state_dict(), before, atol=0, rtol=0)
    assert engine.step(split(ingest.batch(range(8, 16)), 1), 1e-2, math.inf).applied
