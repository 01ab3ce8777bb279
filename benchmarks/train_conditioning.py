"""Do small trainings learn their conditions? Overfitting, tokens, joint scales, Summarizers.

python -m benchmarks.train_conditioning data=DIR bundle=DIR [work=DIR] [only=overfit] [out=PAGE.md]

`data` holds EXAMPLES and LATENTS of scales 0 to 3, `bundle` the autoencoder of the latents;
both are only read. Networks are those of preset `tiny`, on one core. Trainings stand in `work`:
the same command goes on. `scales` and `summarizers` are in train_scales.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from jaxtyping import Float

from benchmarks import page, train_scales
from benchmarks.page import Section
from benchmarks.train_rows import Counts, Study, few
from raylarge import report, tables
from raylarge.config import parse
from raylarge.errors import UserError
from raylarge.evaluate.conditioning import shuffled_loss
from raylarge.metrics.frechet import frechet, moments
from raylarge.models import bundle as bundles
from raylarge.models.bundle import Bundle

OVERFIT = 16
"""Examples of each scale to overfit."""
BELOW = 0.2
"""Required reduction of the conditional loss below the twin's."""
RAISED = 0.1
"""Required increase of the loss by shuffled conditions, at every scale."""
NEARER = 5.0
"""Required ratio of the distances of noise and of drawn tokens from the Summarizer's."""
TOKENS = 65
MOST = 512
"""Real rows of a scale to compare drawn tokens with."""


@dataclass(frozen=True)
class ConditioningBench:
    """Sections and sizes of the benchmark.

    Attributes:
        only: of overfit, tokens, scales and summarizers.
        work: folder of the small tables and trainings; a temporary one if left out.
        seed: of weights, samples and draws.
        batch: of all trainings.
        overfit_steps: of the model on 64 examples and of its unconditional twin.
        steps: of each other latent diffusion model.
        cdm_steps: of the CDM.
        rows: training examples of scales 0, 1, …, a quarter as many per octave.
        held_out: held-out examples of each scale, for conditions.
        references: other held-out examples of each scale, for KID.
        drawn: token grids that the CDM draws for each scale.
        guidance: of the samples.
        sampler_steps: of DDIM.
        out: the page to write; left out, it is only printed.
    """

    data: str = ""
    bundle: str = ""
    only: str = "overfit,tokens,scales,summarizers"
    work: str = ""
    seed: int = 0
    batch: int = 16
    overfit_steps: int = 600
    steps: int = 800
    cdm_steps: int = 600
    rows: tuple[int, ...] = (4096, 1024, 256, 64)
    held_out: int = 96
    references: int = 160
    drawn: int = 128
    guidance: float = 1.5
    sampler_steps: int = 20
    out: str = ""

    def study(self, name: str, counts: Counts) -> Study:
        """Return the study of a name, with its rows selected."""
        data = str(Path(self.work, name, "data"))
        few(self.data, self.bundle, data, counts)
        work = str(Path(self.work, name))
        return Study(data, self.bundle, work, {"batch": self.batch, "seed": self.seed})

    def scales(self) -> Study:
        """Return a study with few rows of coarse scales, many of fine ones, and held-out rows."""
        counts = dict.fromkeys(range(len(self.rows)), self.held_out + self.references)
        return self.study("scales", {"train": dict(enumerate(self.rows)), "val": counts})


def overfit(config: ConditioningBench) -> Section:
    """Overfit a conditional model and its unconditional twin."""
    counts = {"train": dict.fromkeys(range(len(config.rows)), OVERFIT)}
    rows, short = heart(config.study("overfit", counts), config.overfit_steps)
    note = (
        f"{OVERFIT} real examples of each scale, unmirrored; {config.overfit_steps} steps of "
        f"{config.batch}, cosine from 1e-3, v predicted, conditions dropped with p = 0.1 (the "
        f"twin: 1), seed {config.seed}. Mean squared error of v over the training rows at the "
        f"same 8 draws of noise each, averaged U-Net. Shuffled: each row has the embeddings of "
        f"another row of its scale. Aims: below the twin by {BELOW:.0%} over all scales, shuffled "
        f"above by {RAISED:.0%} at every scale. Null: without any condition, which must be above "
        f"the conditional loss where the condition helps."
    )
    header = ["scale", "twin", "conditional", "below", "shuffled", "above", "null"]
    return Section("64 examples by heart", header, rows, [note], short)


def heart(study: Study, steps: int, **more: object) -> tuple[list[list[str]], list[str]]:
    """Return the rows of `overfit`, the last over all scales, and missed goals."""
    losses_by_model = {}
    for name, drop in (("conditional", 0.1), ("twin", 1.0)):
        bundle = study.trained(name, steps=steps, **{**more, "ldm": {"drop": drop}})
        losses_by_model[name] = shuffled_loss(bundle, study.data, study.latents, "train")
    rows, short, losses = [], [], []
    for k, own in losses_by_model["conditional"].items():
        losses.append(
            [losses_by_model["twin"][k]["null"], own["true"], own["shuffled"], own["null"]]
        )
        rows.append([str(k), *_compared(losses[-1])])
        if own["shuffled"] < (1 + RAISED) * own["true"]:
            short.append(
                f"Overfit: at scale {k} shuffled conditions raise the loss by {rows[-1][5]}."
            )
    rows.append(["all", *_compared(np.mean(losses, axis=0))])
    if not np.mean(losses, axis=0)[1] < (1 - BELOW) * np.mean(losses, axis=0)[0]:
        short.append(f"Overfit: the conditional loss is {rows[-1][3]} below the twin's.")
    return rows, short


def _compared(losses: Sequence[float]) -> list[str]:
    twin, true, shuffled, null = losses
    below, above = f"{1 - true / twin:.0%}", f"{shuffled / true - 1:.0%}"
    return [f"{twin:.3f}", f"{true:.3f}", below, f"{shuffled:.3f}", above, f"{null:.3f}"]


def tokens(config: ConditioningBench) -> Section:
    """Compare tokens drawn by the CDM with those of real examples."""
    study = config.scales()
    out = study.learned("together", steps=config.steps)
    study.learned("together", "cdm", steps=config.cdm_steps)
    rows, short = drawn_tokens(bundles.load(out), study.data, config.drawn, config.seed)
    note = (
        f"CDM of width 128 and depth 4, {config.cdm_steps} steps of {config.batch}, on the tokens "
        f"of {' + '.join(map(str, config.rows))} examples; {config.drawn} grids drawn per scale, "
        f"50 steps. Frechet distance to the training rows' tokens (at most 512), 65 x 128 "
        f"flattened and projected to their first principal components, a quarter as many as "
        f"rows or draws, at most 32. N(0, 1): the noise that sampling begins with. Matched: "
        f"Gaussian noise with the mean and deviation of each channel, and of each channel of "
        f"each token. Held out: real tokens of the held-out section. Aim: {NEARER:g} times "
        f"nearer than N(0, 1)."
    )
    header = ["scale", "components", "CDM", "N(0, 1)", "times", "matched by channel", "times"]
    header += ["by token and channel", "times", "held out"]
    return Section("Tokens drawn by the CDM", header, rows, [note], short)


def drawn_tokens(
    bundle: Bundle, data: str, count: int, seed: int
) -> tuple[list[list[str]], list[str]]:
    """Return the rows of `tokens`, and missed goals."""
    rows, short = [], []
    scales = tables.rows(data, "examples", columns=["scale"])["scale"].to_pylist()
    for k in sorted(set(scales)):
        real, held_out = (summarized(bundle, data, k, split) for split in ("train", "val"))
        near = Near(real, min(32, count // 4, len(real) // 4))
        drawn = bundle.cdm.draw(k, seed, [(k, 0, i) for i in range(count)]).flatten(1)
        own, distances = near(drawn.numpy()), [near(one) for one in noises(real, count, seed)]
        pairs = [(f"{distance:.1f}", f"{distance / own:.1f}") for distance in distances]
        distance_held_out = f"{near(held_out):.2f}" if len(held_out) else "–"
        rows.append([str(k), str(len(near.axes)), f"{own:.2f}", *sum(pairs, ()), distance_held_out])
        if distances[0] < NEARER * own:
            short.append(f"Tokens: at scale {k} the CDM's are {pairs[0][1]} times nearer.")
    return rows, short


class Near:
    """Frechet distance from real samples, in the space of their principal components."""

    def __init__(self, real: Float[np.ndarray, "n d"], components: int) -> None:
        self.mean = real.mean(axis=0)
        self.axes = np.linalg.svd(real - self.mean, full_matrices=False)[2][:components]
        self.real = moments(self._project(real))

    def __call__(self, samples: Float[np.ndarray, "m d"]) -> float:
        """Return the Frechet distance."""
        return frechet(*moments(self._project(samples)), *self.real)

    def _project(self, samples: np.ndarray) -> np.ndarray:
        return (samples - self.mean) @ self.axes.T


def noises(real: Float[np.ndarray, "n d"], count: int, seed: int) -> list[np.ndarray]:
    """Return N(0, 1) noise; with mean and deviation by channel; with those by value."""
    noise = np.random.default_rng(seed).standard_normal((count, real.shape[1]))
    cells = real.reshape(len(real), TOKENS, -1)
    mean, deviation = (np.tile(f(cells, axis=(0, 1)), TOKENS) for f in (np.mean, np.std))
    return [noise, noise * deviation + mean, noise * real.std(axis=0) + real.mean(axis=0)]


@torch.no_grad()
def summarized(bundle: Bundle, data: str, k: int, split: str) -> Float[np.ndarray, "n d"]:
    """Return the flattened tokens of at most 512 rows of a scale."""
    rows = tables.rows(data, "examples", columns=["split", "scale", "grid", "grid_rows"])
    rows = rows.filter(pc.and_(pc.equal(rows["scale"], k), pc.equal(rows["split"], split)))
    if not len(rows):
        return np.empty((0, 0))
    rows = rows.take(np.arange(min(MOST, len(rows))) * len(rows) // min(MOST, len(rows)))
    side = rows["grid_rows"][0].as_py()
    grids = tables.lists(rows["grid"])[0].reshape(len(rows), side, side, -1)
    cells = torch.from_numpy(grids.astype(np.float32)).movedim(-1, 1)
    tokens = [bundle.summarizer(some, torch.full((len(some),), k)) for some in cells.split(32)]
    return torch.cat(tokens).flatten(1).numpy()


SECTIONS: dict[str, Callable[[ConditioningBench], Section]] = {
    "overfit": overfit,
    "tokens": tokens,
    "scales": lambda config: train_scales.together(config.scales(), config),
    "summarizers": lambda config: train_scales.summarizers(config.scales(), config),
}


def main(words: list[str]) -> None:
    """Train, compare, print and optionally write."""
    torch.set_num_threads(1)
    config = parse(ConditioningBench, words, {})
    names = config.only.split(",")
    if unknown := set(names) - SECTIONS.keys():
        raise UserError(f"only={','.join(sorted(unknown))} is not of {', '.join(SECTIONS)}.")
    if not (config.data and config.bundle):
        raise UserError("give data=DIR bundle=DIR: prepared tables, and the autoencoder's bundle.")
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, work=os.path.abspath(config.work or folder))
        sections = []
        for name in names:
            sections.append(SECTIONS[name](config))
            page.show(sections[-1])
    if config.out:
        command = page.command("benchmarks.train_conditioning")
        page.write(config.out, "Conditioning of small trainings", command, sections)


if __name__ == "__main__":
    report.entry(main)
