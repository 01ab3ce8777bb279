"""Training on paper: its counts against real tensors, its states against a real optimiser."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from raylarge.config import build
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.models import cost
from raylarge.models.bundle import Bundle
from raylarge.models.summarizer import Summarizer
from raylarge.train import registry
from raylarge.train.activations import recompute
from raylarge.train.config import Train, checked
from raylarge.train.context import LocalContext
from raylarge.train.estimate import memory, model_states, plan
from raylarge.train.micro_batches import MicroBatch
from raylarge.train.task import DataFacts
from raylarge.train.tasks.cdm import CdmTask
from raylarge.train.torch_engine import TorchEngine

FACTS = DataFacts(8, {0: 900, 1: 90, 3: 10}, (3, 64, 64), (3, 16, 16), 0.5, {})
BRCA = DataFacts(1024, dict.fromkeys(range(8), 2_000_000), (3, 256, 256), (3, 64, 64), 0.5, {})
TINY = {
    "unet": {"channels": [32, 64], "attention": [False, True], "layers": 1, "groups": 8},
    "summarizer": {"width": 64, "layers": 1, "heads": 4},
}


def config_of(model="ldm", **more):
    places = {"model": model, "data": "-", "out": "-"}
    return build(Train, places, {"ldm": TINY} if model == "ldm" else {}, more)


def real(config):
    """The tiny diffusion model with weights, and two of its samples."""
    task = registry.build(config.run, FACTS)
    return task, task.draw(plan.example(FACTS, 2))


@pytest.fixture(scope="module")
def full():
    """ZoomLDM at full size, 8 workers, ZeRO-1, bf16; worked out once."""
    config = build(
        Train,
        {"model": "ldm", "data": "-", "out": "-", "workers": 8, "batch": 600, "precision": "bf16"},
    )
    task = plan.on_meta(partial(registry.build, config.run), BRCA)
    return config, task, plan.plan(config, config.worker_group, config.card, BRCA, task)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_fake_tensors_count_as_real_ones(half, again, one_thread):
    task, batch = real(config_of())
    fake = memory.on_paper(task.network, batch, 2, half, again)
    if again:
        recompute(task.network)
    found = memory.measured(task.network.train(), batch, half)
    assert fake.saved == found.saved > 1e6
    assert (fake.forward, fake.flops) == (found.forward, found.flops)
    # Scalars that Python makes on the way are not always alive for as long.
    assert fake.ahead == pytest.approx(found.ahead, abs=1000)
    assert fake.back == pytest.approx(found.back, abs=1000)


def test_half_precision_is_that_of_cuda():
    """Fake tensors of a card are cast by torch's own rules for it, with no card there."""

    def network():
        norm = nn.GroupNorm(4, 16)
        first = [nn.Conv2d(3, 16, 3, padding=1), norm, nn.SiLU(), nn.Conv2d(16, 16, 1)]
        return nn.Sequential(*first, nn.Flatten(2), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8))

    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, batch):
            return self.inner(batch["image"]).flatten(1).sum(dim=1)

    ours = memory.on_paper(Task(), {"image": torch.zeros(1, 3, 8, 8)}, 4, half=True)
    saved = {}
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            theirs, image = network(), torch.empty(4, 3, 8, 8)
            held_already = {one.untyped_storage()._cdata for one in theirs.parameters()}

            def keep(tensor):
                saved[tensor.untyped_storage()._cdata] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                theirs(image).flatten(1).sum(dim=1)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    there = sum(t.untyped_storage().nbytes() for k, t in saved.items() if k not in held_already)
    assert ours.saved == there
    single = memory.on_paper(Task(), {"image": torch.zeros(1, 3, 8, 8)}, 4, half=False)
    assert single.saved != there


def test_every_batch_lies_on_the_lines():
    task, batch = real(config_of())
    grown = memory.activations(task.network, batch, half=True, again=True)
    for size, near in ((1, 0.05), (500, 1e-6)):
        found = memory.on_paper(task.network, batch, size, half=True, again=True)
        assert grown.saved.at(size) == pytest.approx(found.saved, rel=near)
        assert grown.peak(size) == pytest.approx(max(found.ahead, found.back), rel=near)
    most = grown.most(5e8)
    assert grown.peak(most) <= 5e8 < grown.peak(most + 1)
    assert grown.most(0.0) == 0


def test_flops_are_those_of_torch_s_counter(one_thread):
    task, batch = real(config_of())
    found = memory.measured(task.network, batch, half=False)
    with FlopCounterMode(display=False) as counter:
        task.network(batch).mean().backward()
    assert found.flops == counter.get_total_flops()
    unet, two = task.network.unet, torch.zeros(2, dtype=torch.long)
    alone = cost.forward_flops(unet, batch["latent"], two, torch.empty(2, 65, 64))
    grids = cost.forward_flops(task.network.summarizer, torch.empty(2, 8, 8, 8), two)
    assert found.forward == alone + grids


def test_weights_are_left_as_they_are(one_thread):
    task, batch = real(config_of())
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    memory.on_paper(task.network, batch, 3, half=True, again=True)
    assert all(torch.equal(before[k], v) for k, v in task.network.state_dict().items())
    assert not any(one.is_gradient_checkpointing for one in [task.network.unet])
    assert task.network(batch).shape == (2,)


def test_states_are_those_of_a_real_step(one_thread):
    config = config_of()
    task, batch = real(config)
    states = model_states.states(
        model_states.parts(task),
        model_states.fixed_bytes(task.network),
        config,
        config.worker_group,
    )
    engine = TorchEngine(task, config, LocalContext(lambda status: None))
    (engine.network(batch).sum()).backward()
    bytes_of = {
        "weights": sum(p.nbytes for p in task.network.parameters()),
        "gradients": sum(p.grad.nbytes for p in task.network.parameters()),
        "average": sum(value.nbytes for value in engine.ema.shadow.values()),
    }
    engine.step([MicroBatch(batch, 2)], 1e-3, float("inf"))
    kept = [value for one in engine.optimizer.state.values() for value in one.values()]
    bytes_of["optimiser"] = sum(value.nbytes for value in kept if value.ndim)
    assert {name: size for name, size in states.card.items() if size} == bytes_of
    assert states.host == 0


def test_the_full_model_in_seconds(full):
    _, task, made = full
    assert {one.device.type for one in task.network.parameters()} == {"meta"}
    unet, summarizer = made.parts
    assert (unet.name, unet.trained, unet.averaged) == ("unet", 400_920_579, 400_920_579)
    assert (summarizer.trained, summarizer.averaged) == (38_656_000, 0)
    assert made.activations.forward == pytest.approx(210.6e9 + 5.1e9, rel=0.01)
    assert made.activations.flops / made.activations.forward == pytest.approx(3, abs=0.05)
    assert (made.micro_batch, made.passes) == (75, 1)
    assert 30 < made.memory / plan.GIB < 60
    assert made.fits
    assert made.memory <= made.usable


def test_stages_divide_more_and_more(full):
    config, _, made = full
    n = 4.0 * 439_576_579

    def states(**more):
        changed = dataclasses.replace(config, **more)
        return model_states.states(made.parts, 0.0, changed, changed.worker_group)

    totals = [states(zero=stage).total for stage in (3, 2, 1, 0)]
    assert totals == sorted(totals)
    assert len(set(totals)) == 4
    zero, one, two, three = (states(zero=stage).card for stage in range(4))
    assert zero["optimiser"] == 2 * n
    assert one["optimiser"] == 3 * n / 8  # with its own copy of the weights that it updates
    assert (one["gradients"], two["gradients"]) == (n, n / 8)
    assert (two["weights"], three["weights"]) == (n, n / 8)
    offloaded = states(zero=2, offload=True)
    assert (offloaded.card["optimiser"], offloaded.host) == (0.0, two["optimiser"])
    ddp = states(strategy="torch", zero=2)
    assert (ddp.card["gradients"], ddp.card["gradients under way"]) == (n, 0.0)
    assert states(strategy="torch", optimizer="adamw8bit").card["optimiser"] == n / 2


def test_time_and_money(full):
    _, _, made = full
    card = made.card
    rate = 8 * 0.35 * 989.4e12 / made.activations.flops
    assert made.samples_per_s == pytest.approx(rate)
    longer = dataclasses.replace(made, steps=100_000)
    assert longer.days == pytest.approx(6e7 / rate / 86400)
    assert longer.dollars == pytest.approx(longer.days * 24 * 8 * 2.5)
    assert longer.epochs == pytest.approx(6e7 / 16e6)
    assert dataclasses.replace(longer, minutes=60.0).days == pytest.approx(1 / 24)
    single = dataclasses.replace(made, half=False)
    assert single.samples_per_s / rate == pytest.approx(card.card_tflops_fp32 / card.card_tflops)


def test_a_plan_is_told_plainly(full):
    _, _, made = full
    text = plan.format_plan(made)
    for words in ("400,920,579", "600 samples = 8 x 1 x 75", "dollars", "It fits", "Left out"):
        assert words in text
    assert f"the largest pass that fits has {made.largest} samples" in text
    rows = dict(line.rsplit(None, 1) for line in text.split("\n\n")[1].splitlines()[2:])
    *terms, whole, _ = (float(value) for value in rows.values())
    assert sum(terms) == pytest.approx(whole, abs=0.05)
    small = dataclasses.replace(made, card=plan.PlanConfig(card_gib=24.0))
    assert not small.fits
    assert f"micro_batch={small.largest} is the largest that fits" in plan.verdict(small)
    none = dataclasses.replace(made, card=plan.PlanConfig(card_gib=4.0))
    assert none.largest == 0
    assert "does not hold one sample" in plan.verdict(none)


def test_what_is_frozen_and_hidden_counts():
    config = config_of("cdm", cdm={"width": 64, "depth": 2, "heads": 4}, batch=32, micro_batch=5)
    tokens = Summarizer(8, 64, 1, 4, 4)
    bundle = Bundle(None, None, tokens, None, Schedule(), Patch(64, 4, 3, 4), "")
    bundle.schedule.abar  # noqa: B018 (kept from before, on a real device)
    made = plan.plan(
        config, config.worker_group, config.card, FACTS, CdmTask(config.cdm, bundle, 0)
    )
    cdm, beside = made.parts
    count = sum(one.numel() for one in tokens.parameters())
    assert (cdm.fixed, beside.trained, beside.fixed, beside.averaged) == (0, 0, count, 0)
    positions = 65 * 64
    assert made.states.card["weights that are fixed"] == 4 * (count + positions)
    frozen = cost.forward_flops(tokens, torch.empty(1, 8, 8, 8), torch.zeros(1, dtype=torch.long))
    trained = made.activations.forward - frozen
    assert made.activations.flops - frozen == pytest.approx(3 * trained, rel=0.1)
    assert (made.passes, made.micro_batch) == (7, 5)


def test_what_joins_later_counts():
    """A discriminator that begins at step 50,000 is in the plan, whoever gives the samples."""
    judge = {"adversarial": 0.1, "discriminator": {"width": 16, "layers": 2}}
    more = {"kind": "vq", "channels": [32, 32, 32], "layers": 1, "adversarial_from": 50_000}
    config = config_of("vae", vae={**more, **judge})
    task = plan.on_meta(partial(registry.build, config.run), FACTS)
    early = {**plan.example(FACTS, 2), "sample": torch.arange(2)}
    made = plan.plan(config, config.worker_group, config.card, FACTS, task, early)
    alone = memory.on_paper(task.network, task.draw(early), 2, half=False)
    assert made.activations.forward > alone.forward / 2


def test_an_example_is_what_a_source_gives():
    facts = dataclasses.replace(FACTS, vector=5, classes=("a", "b"))
    batch = plan.example(facts, 2)
    shapes = {name: tuple(value.shape[1:]) for name, value in batch.items()}
    assert shapes["grid"] == (64, 8)
    assert (shapes["image"], shapes["latent"]) == ((3, 64, 64), (3, 16, 16))
    assert (shapes["vector"], shapes["label"]) == ((5,), ())
    assert batch["scale"].tolist() == [3, 3]
    assert batch["grid_rows"].tolist() == [8, 8]
    bare = dataclasses.replace(FACTS, channels=0, latent=None)
    assert plan.example(bare, 1).keys() == {"sample", "scale", "image"}


def test_what_cannot_be_planned_is_said():
    class Choosy(nn.Linear):
        def forward(self, batch):
            x = batch["image"].flatten(1)[:, :2]
            return super().forward(x if x.sum() > 0 else -x).sum(dim=1)

    with pytest.raises(UserError, match="Choosy cannot be planned on paper"):
        memory.activations(Choosy(2, 1), plan.example(FACTS, 2), half=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e308])
@pytest.mark.parametrize("key", [one.name for one in dataclasses.fields(plan.PlanConfig)])
def test_a_card_that_cannot_be_is_refused(key, value):
    with pytest.raises(UserError, match=rf"card\.{key}=.*: it must be"):
        plan.PlanConfig(**{key: value}).check()


@pytest.mark.parametrize(
    ("key", "value"),
    [("card_gib", 0.0), ("card_tflops", 0.0), ("utilisation", 0.0), ("free", 1.0)],
)
def test_a_card_has_something(key, value):
    with pytest.raises(UserError, match=rf"card\.{key}={value}: it must be .*0"):
        plan.PlanConfig(**{key: value}).check()


@pytest.mark.parametrize("on_paper", [True, False])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cdm": {"heads": 5}}, "heads=5: it must be a divisor of cdm.width=768"),
        ({"cdm": {"heads": 0}}, "heads=0: it must be"),
        ({"cdm": {"width": 0}}, "width=0: it must be an even number above 0"),
        ({"cdm": {"width": 3, "heads": 1}}, "width=3: it must be an even number above 0"),
        ({"cdm": {"depth": 0}}, "depth=0: it must be 1 or more"),
        ({"prediction": "v"}, "prediction=v: it must be epsilon, v_prediction or sample"),
        ({"drop": 2.0}, "drop=2.0: it must be 0 to 1"),
        ({"drop": float("nan")}, "drop=nan"),
        ({"region": "foo", "summarizer": {"kind": "vector"}}, "region=foo: .*vectors-DIGEST"),
        ({"region": "vectors-1"}, "region=vectors-1: .*kind=vector alone"),
        ({"summarizer": {"kind": "gru"}}, "summarizer.kind=gru: it must be vit, cnn or vector"),
        ({"summarizer": {"width": 0}}, "summarizer.width=0: it must be 1 or more"),
        ({"summarizer": {"layers": 0}}, "summarizer.layers=0: it must be 1 or more"),
        ({"summarizer": {"heads": 3}}, "summarizer.heads=3: it must be a divisor of the width 64"),
        ({"summarizer": {"heads": 0}}, "summarizer.heads=0"),
        ({"unet": {"channels": []}}, r"unet.channels=\[\]: it must be one or more widths"),
        ({"unet": {"channels": [-8, 16]}}, r"unet.channels=\[-8,16\]: it must be .* above 0"),
        ({"unet": {"attention": [True]}}, r"unet.attention=\[true\]: .* channels=\[32,64\]"),
        ({"unet": {"layers": 0}}, "unet.layers=0: it must be 1 or more"),
        ({"unet": {"groups": 3}}, r"unet.groups=3: it must be a divisor of .*\[32,64\]"),
        ({"unet": {"groups": 0}}, "unet.groups=0"),
        ({"unet": {"heads": 3}}, r"unet.heads=3: it must be a divisor of .*\[64\] that attend"),
    ],
)
def test_a_network_that_cannot_be_is_refused(change, says, on_paper):
    model = "cdm" if "cdm" in change else "ldm"
    places = {"data": "", "out": "", "plan": True} if on_paper else {}
    with pytest.raises(UserError, match=f"^{model}.{says}"):
        checked(config_of(model, **{model: change.get("cdm", change)}, **places))


@pytest.mark.parametrize(
    "change",
    [
        {"prediction": "sample", "drop": 1.0},
        {"summarizer": {"kind": "cnn", "heads": 3}},
        {"summarizer": {"kind": "vector"}, "region": "vectors-1"},
        {"unet": {"channels": [30, 60], "groups": 6, "heads": 4}},
    ],
)
def test_a_diffusion_model_that_can_be_is_taken(change):
    config = checked(config_of(ldm=change))
    assert config == checked(config)
    plan.on_meta(partial(registry.build, config.run), FACTS)
