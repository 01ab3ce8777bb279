"""Training on paper: patches against whole images, ZeRO stages, what the presets cost.

python -m benchmarks.train_memory [only=patches,stages,presets] [out=PAGE.md]

Shapes alone, of full-size networks (`raylarge/train/plan.py`); a minute of one core, no GPU.
The first table is Graikos et al.'s Table 6 (supplement 12) by this model; their figures are
quoted, not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor

from benchmarks import page
from benchmarks.page import Section
from jobs.presets import TRAIN, overrides
from raylarge import report
from raylarge.config import build, parse
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.models.bundle import Bundle
from raylarge.models.summarizer import Summarizer
from raylarge.train.config import Train
from raylarge.train.estimate import model_states, plan
from raylarge.train.estimate.memory import Activations
from raylarge.train.estimate.plan import GIB, PlanConfig, TrainEstimate
from raylarge.train.task import DataFacts, TrainTask
from raylarge.train.tasks.cdm import CdmTask
from raylarge.train.tasks.ldm import LdmTask
from raylarge.train.tasks.vae import build as build_vae

CARDS_GIB = (24, 48, 80)
PATCHES = 15_000_000
"""Patches of an epoch on TCGA-BRCA (Graikos et al., supplement 9)."""

QUOTED = {256: (100, 45), 1024: (4, 300)}
"""Largest batch and hours an epoch by the image's side, on one RTX 6000: Table 6, as quoted."""

BRCA = (12_509_760, 3_036_288, 752_000, 187_280, 57_090, 20_679, 7_923, 2_489)
NAIP = (365_119, 94_263, 25_690, 8_772)
"""Examples by scale of ZoomLDM's two data sets."""

SMALL = DataFacts(1280, dict.fromkeys(range(6), 10_000), (3, 64, 64), (3, 16, 16), 0.7, {})
"""DataFacts of some slides; the number of rows only defines an epoch."""


def facts(channels: int, counts: tuple[int, ...], side_px: int = 256) -> DataFacts:
    """Return the facts of published data: f4 latents of 3 channels."""
    latent = (3, side_px // 4, side_px // 4)
    return DataFacts(channels, dict(enumerate(counts)), (3, side_px, side_px), latent, None, {})


PUBLISHED = {
    "small": SMALL,
    "brca": facts(1024, BRCA),
    "naip": facts(1024, NAIP),
    "graikos_brca": facts(384, (4 * PATCHES,)),
    "graikos_crc": facts(768, (4 * 8_000_000,)),
    "graikos_naip": facts(768, (4 * 667_000,)),
}
"""By preset; Graikos et al.'s patches count four times, mirrored."""


@dataclass(frozen=True)
class MemoryBench:
    """Sections of the benchmark.

    Attributes:
        only: of patches, stages and presets.
        out: the page to write; left out, it is only printed.
        card: as of `plan=true`.
    """

    only: str = "patches,stages,presets"
    out: str = ""
    card: PlanConfig = field(default_factory=PlanConfig)


def config_of(model: str, *layers: dict[str, Any]) -> Train:
    """Return the config of a training, without access to its folders."""
    return build(Train, {"model": model, "data": "-", "out": "-"}, *layers)


def task_of(config: Train, facts: DataFacts) -> TrainTask:
    """Build the task of a training on the meta device, without a bundle."""
    with torch.device("meta"):
        if config.model == "vae":
            return build_vae(config.vae, config.run, facts)
        if config.model == "ldm":
            return LdmTask(config.ldm, facts, config.seed)
        ours = config_of("ldm", TRAIN["ldm"]["small"] if facts is SMALL else {}).ldm.summarizer
        tokens = Summarizer(facts.channels, ours.width, ours.layers, ours.heads, len(facts.counts))
        patch = Patch(facts.image[-1], 4, 3, len(facts.counts))
        return CdmTask(
            config.cdm, Bundle(None, None, tokens, None, Schedule(), patch, ""), config.seed
        )


_KNOWN: dict[tuple[Any, ...], Activations] = {}
"""Cache of activations; they do not depend on the number of scales."""


def planned(config: Train, facts: DataFacts, explicit: bool = False) -> TrainEstimate:
    """Estimate a training.

    Args:
        explicit: attention has its whole matrix in memory.
    """
    task = task_of(config, facts)
    network = getattr(config, config.model)
    key = (config.model, network, config.precision, config.checkpointing, explicit)
    key = (*key, facts.channels, facts.image)
    if key in _KNOWN:
        return plan.of(config, config.worker_group, config.card, facts, task, _KNOWN[key])
    with unfused(task) if explicit else nullcontext():
        plan_ = plan.plan(config, config.worker_group, config.card, facts, task)
    _KNOWN[key] = plan_.activations
    return plan_


@contextmanager
def unfused(task: TrainTask) -> Iterator[None]:
    """Use explicit attention with softmax in float32, as in the released code."""
    unet: Any = task.network.unet
    before = unet.attn_processors
    unet.set_attn_processor(AttnProcessor())
    layers = [one for one in unet.modules() if hasattr(one, "upcast_softmax")]
    for layer in layers:
        layer.upcast_softmax = True
    yield
    unet.set_attn_processor(before)


def patches(card: PlanConfig) -> Section:
    """Reproduce Table 6: largest batch, cost of a sample, time of an epoch of equal pixels."""
    released = {**overrides("ldm", "graikos_brca"), "workers": 0, "card": card}
    config, plans = config_of("ldm", released), {}
    for side_px in QUOTED:
        data = facts(384, (PATCHES * 256**2 // side_px**2,), side_px)
        for explicit in (False, True):
            one = planned(config, data, explicit)
            plans[side_px, explicit] = replace(one, states=without_average(one, config))
    rows = [_patches_row(*key, one, plans[256, key[1]]) for key, one in plans.items()]
    return Section(
        "Patches against whole images (Graikos et al., Table 6)", _HEADER, rows, _notes(plans)
    )


_HEADER = (
    "image",
    "attention",
    "states, GiB",
    "MiB a sample",
    *(f"largest batch, {gib} GB" for gib in CARDS_GIB),
    "TFLOP a sample",
    "hours an epoch",
    "times the patches'",
    "largest batch, quoted",
    "hours an epoch, quoted",
)


def _patches_row(
    side_px: int, explicit: bool, plan_: TrainEstimate, patch: TrainEstimate
) -> list[str]:
    sample = plan_.activations.peak(2) - plan_.activations.peak(1)
    hours, of_patches = (one.rows / one.samples_per_s / 3600 for one in (plan_, patch))
    return [
        f"{side_px}²",
        "whole matrix" if explicit else "fused",
        f"{plan_.states.total / GIB:.1f}",
        f"{sample / 2**20:,.0f}",
        *(str(largest(plan_, gib)) for gib in CARDS_GIB),
        f"{plan_.activations.flops / 1e12:.2f}",
        f"{hours:.1f}",
        f"{hours / of_patches:.2f}",
        *map(str, QUOTED[side_px]),
    ]


def _notes(plans: dict[tuple[int, bool], TrainEstimate]) -> list[str]:
    card = plans[256, True].card
    least = [largest(plans[side_px, True], CARDS_GIB[0]) for side_px in QUOTED]
    return [
        f"One U-Net of 400.9 M parameters on f4 latents with one token, bf16, activation "
        f"checkpointing, AdamW in 8 bit, no average, as the released code trains; {card.free:.0%} "
        f"of a card stay free. An epoch is 15 M patches, or as many pixels in larger images, at "
        f"{card.utilisation:.0%} of {card.card_tflops:g} TFLOP/s. Fused attention computes its "
        f"matrix anew in the backward pass, hence its FLOPs.",
        f"Quoted: Graikos et al., supplement 12, Table 6, on one RTX 6000; cards of that name "
        f"have 24 or 48 GB. With the whole matrix of attention in memory, as in their code, this "
        f"model gives {least[0]} and {least[1]} on {CARDS_GIB[0]} GB. Their loop also encodes "
        f"every image in the step (345 GFLOP a patch), which `encode` has done once here.",
        "The rest of the quoted 300 h against 45 h is how fast small batches and large matrices "
        "run, of which FLOPs know nothing.",
    ]


def largest(plan_: TrainEstimate, gib: float) -> int:
    """Return the samples of the largest micro-batch on a GPU of some memory."""
    return replace(plan_, card=replace(plan_.card, card_gib=float(gib))).largest


def without_average(plan_: TrainEstimate, config: Train) -> model_states.ModelStates:
    """Return the model states without a moving average."""
    parts = [replace(part, averaged=0) for part in plan_.parts]
    return model_states.states(
        parts, plan_.states.card["weights that are fixed"], config, config.worker_group
    )


def stages(card: PlanConfig) -> Section:
    """Compute the memory of ZoomLDM by ZeRO stage on 8 workers, and the largest micro-batch."""
    rows, data, base = [], PUBLISHED["brca"], {"workers": 8, "batch": 600, "precision": "bf16"}
    for again in (False, True):
        config = config_of("ldm", {**base, "checkpointing": again, "card": card})
        plan_ = planned(config, data)
        for zero, offload in ((0, False), (1, False), (2, False), (3, False), (2, True)):
            fixed = plan_.states.card["weights that are fixed"]
            one = replace(config, zero=zero, offload=offload)
            stage = replace(
                plan_, states=model_states.states(plan_.parts, fixed, one, one.worker_group)
            )
            rows.append(
                [
                    f"{zero}{', offload' if offload else ''}",
                    "yes" if again else "no",
                    f"{stage.states.total / GIB:.2f}",
                    f"{stage.states.host / GIB:.2f}",
                    *(str(largest(stage, gib)) for gib in CARDS_GIB),
                ]
            )
    header = ["ZeRO", "checkpointing", "states, GiB", "on the host, GiB"]
    header += [f"largest pass, {gib} GB" for gib in CARDS_GIB]
    note = (
        "ZoomLDM, 439.6 M parameters, bf16, 8 workers; states are what a card holds all the time."
    )
    return Section("ZoomLDM by ZeRO stage", header, rows, [note])


def presets(card: PlanConfig) -> Section:
    """Compute the cost of each preset."""
    rows = []
    for name, model in _trainings():
        config = config_of(model, overrides(model, name), {"card": card})
        plan_ = planned(config, PUBLISHED[name.removesuffix("_released")])
        millions = sum(part.trained for part in plan_.parts) / 1e6
        rows.append(
            [
                name,
                model,
                f"{millions:.1f} M",
                f"{plan_.workers} x {plan_.passes} x {plan_.micro_batch}",
                f"{plan_.memory / GIB:.1f}",
                f"{plan_.activations.flops / 1e9:,.1f}",
                f"{plan_.steps:,}",
                f"{plan_.epochs:.3g}",
                f"{plan_.days * 24 * plan_.workers:.3g}",
                f"{plan_.days:.2g}",
                f"{plan_.dollars:,.0f}",
            ]
        )
    header = ["preset", "model", "parameters", "cards x passes x samples", "GiB a card"]
    header += ["GFLOP a sample", "steps", "epochs", "hours of a card", "days", "dollars"]
    note = (
        f"At {card.utilisation:.0%} of {card.card_tflops:g} TFLOP/s ({card.card_tflops_fp32:g} in "
        f"fp32) and {card.dollars_per_hour:g} dollars an hour. Networks as small as `small`'s are "
        f"bound by launching kernels: take several times its hours."
    )
    return Section("What the presets take", header, rows, [note])


def _trainings() -> Iterator[tuple[str, str]]:
    """Yield presets and models whose data are published."""
    for model in ("vae", "ldm", "cdm"):
        for name in TRAIN[model]:
            if name.removesuffix("_released") in PUBLISHED:
                yield name, model


SECTIONS = {"patches": patches, "stages": stages, "presets": presets}


def main(words: list[str]) -> None:
    """Compute, print and optionally write."""
    config = parse(MemoryBench, words, {})
    names = config.only.split(",")
    if unknown := set(names) - SECTIONS.keys():
        raise UserError(f"only={','.join(sorted(unknown))} is not of {', '.join(SECTIONS)}.")
    sections = []
    for name in names:
        sections.append(SECTIONS[name](config.card))
        page.show(sections[-1])
    if config.out:
        command = page.command("benchmarks.train_memory")
        page.write(config.out, "Memory and cost of training, on paper", command, sections)


if __name__ == "__main__":
    torch.set_num_threads(1)
    report.entry(main)
