"""Compare one model for all scales with one per scale, and kinds of Summarizers.

    held-out rows -conditions-> DDIM -decode-> patches -encoder-> features ─┐
    other held-out rows of the scale -encoder-> features ───────────────────┴-> KID, its interval

The direction of ZoomLDM's Table 1 and of its Table S3, in small: networks of preset `tiny`,
minutes of training on one core, an encoder that was trained on ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.page import Section
from benchmarks.train_rows import Study
from raylarge import images
from raylarge.diffusion.noise import normal
from raylarge.diffusion.solvers import solve
from raylarge.evaluate.conditioning import shuffled_loss
from raylarge.evaluate.references import ReferenceExample, references
from raylarge.metrics.kernel import kernel_distance
from raylarge.models import ssl
from raylarge.models.bundle import Bundle
from raylarge.models.denoiser import bind_context, guided

DRAWS = 400
"""Number of half samples of an interval."""
AT_ONCE = 16


class Sizes(Protocol):
    """The settings used here (`train_conditioning.ConditioningBench`)."""

    seed: int
    batch: int
    steps: int
    rows: Sequence[int]
    held_out: int
    references: int
    guidance: float
    sampler_steps: int


def together(study: Study, sizes: Sizes) -> Section:
    """Compare one model for all scales with one for each, at equal steps."""
    judge, scales = ModelJudge(study, sizes), range(len(sizes.rows))
    shared = study.trained("together", steps=sizes.steps)
    alone = {
        k: study.trained(
            f"scale-{k}", steps=sizes.steps, scale_weights=[float(k == one) for one in scales]
        )
        for k in scales
    }
    rows, verdict = judge.compared({"together": dict.fromkeys(scales, shared), "alone": alone})
    note = (
        f"{sizes.steps} steps of {sizes.batch} for every model: the shared one sees a "
        f"{len(scales)}th of what a single one sees of its scale. Rows fall to a quarter per "
        f"octave, as the patches of a slide do."
    )
    return Section("One model for all scales or one per scale", judge.header, rows, [
        note, judge.note, verdict,
    ])  # fmt: skip


def summarizers(study: Study, sizes: Sizes) -> Section:
    """Compare the ViT with the convolutional Summarizer."""
    judge, scales = ModelJudge(study, sizes), range(len(sizes.rows))
    kinds = {
        "vit": study.trained("together", steps=sizes.steps),
        "cnn": study.trained("cnn", steps=sizes.steps, ldm={"summarizer": {"kind": "cnn"}}),
    }
    weights = {
        kind: sum(p.numel() for p in bundle.summarizer.parameters()) / 1e6
        for kind, bundle in kinds.items()
    }
    rows, verdict = judge.compared(
        {kind: dict.fromkeys(scales, bundle) for kind, bundle in kinds.items()}
    )
    note = (
        f"{sizes.steps} steps of {sizes.batch} on all scales together; vit: 2 layers of width "
        f"128, {weights['vit']:.2f} M parameters; cnn: 4 convolutions of width 128, "
        f"{weights['cnn']:.2f} M."
    )
    return Section("Kinds of Summarizers", judge.header, rows, [note, judge.note, verdict])


class ModelJudge:
    """Compares models on held-out rows of a slide that none was trained on."""

    def __init__(self, study: Study, sizes: Sizes) -> None:
        """Split the rows: some are conditions, the others references for generated patches."""
        self.study, self.sizes = study, sizes
        self.encoder = ssl.load("efficientnet_lite0")
        self.conditions: dict[int, list[ReferenceExample]] = {}
        self.real: dict[int, Tensor] = {}
        self.floor: dict[int, float] = {}
        for k in range(len(sizes.rows)):
            examples = references(study.data, k, None)
            chosen = set((np.arange(sizes.held_out) * len(examples) // sizes.held_out).tolist())
            self.conditions[k] = [one for i, one in enumerate(examples) if i in chosen]
            others = [one.image for i, one in enumerate(examples) if i not in chosen]
            self.real[k] = self.features(others)
            self.floor[k] = kernel_distance(
                self.features([one.image for one in self.conditions[k]]), self.real[k]
            )
        self.header: list[str] = []

    @property
    def note(self) -> str:
        """Describe how the figures were computed."""
        sizes = self.sizes
        return (
            f"Networks of preset `tiny`, one training of each (seed {sizes.seed}), flips left "
            f"out. Held-out rows are of a section that no training saw. Loss: mean squared error "
            f"of v, 64 rows, 4 draws of noise each, the same for both. KID x 1000: "
            f"{sizes.held_out} patches a scale, DDIM {sizes.sampler_steps} steps, guidance "
            f"{sizes.guidance:g}, on conditions of held-out rows, against {sizes.references} other "
            f"held-out rows, in "
            f"the features of efficientnet_lite0: trained on ImageNet's labels, a stand-in for a "
            f"pathology encoder, and the one whose embeddings are the conditions. In brackets: "
            f"95 % by half-sampling over patches (both models' alike) and rows, not over "
            f"trainings. real: the rows of the conditions themselves."
        )

    def compared(self, models: Mapping[str, Mapping[int, Bundle]]) -> tuple[list[list[str]], str]:
        """Return table rows of two families of models by scale, and a sentence as verdict."""
        first, second = models
        self.header = ["scale", "training rows", f"loss {first}", f"loss {second}"]
        self.header += [f"KID {first}", f"KID {second}", f"KID {second} - {first}", "KID real"]
        losses = {name: self._losses(family) for name, family in models.items()}
        rows, by_loss, by_kid, sure = [], [], [], []
        for k in self.conditions:
            one, other = (losses[name][k] for name in models)
            sets = [self._generated(name, family[k], k) for name, family in models.items()]
            kids = intervals(self.real[k], sets, self.sizes.seed)
            by_loss += [str(k)] * (one < other)
            by_kid += [str(k)] * (kids[-1][0] > 0)
            sure += [str(k)] * (kids[-1][1] * kids[-1][2] > 0)
            cells = [f"{kid:.0f} [{low:.0f}, {high:.0f}]" for kid, low, high in kids]
            rows.append(
                [str(k), str(self.sizes.rows[k]), f"{one:.4f}", f"{other:.4f}", *cells,
                 f"{1000 * self.floor[k]:.0f}"]
            )  # fmt: skip
        ahead = [", ".join(some) or "none" for some in (by_loss, by_kid, sure)]
        return rows, (
            f"`{first}` is ahead of `{second}` by held-out loss at scales: {ahead[0]}; by KID at "
            f"scales: {ahead[1]}. The interval of the difference of KID leaves out 0 at scales: "
            f"{ahead[2]}."
        )

    def features(self, pictures: Sequence[np.ndarray]) -> Float[Tensor, "n d"]:
        """Return features of images, in batches of one size."""
        some = [np.stack(pictures[i : i + AT_ONCE]) for i in range(0, len(pictures), AT_ONCE)]
        return torch.from_numpy(np.concatenate([self.encoder(one) for one in some])).float()

    def _losses(self, family: Mapping[int, Bundle]) -> dict[int, float]:
        """Return the held-out loss of each scale with its model."""
        study, done = self.study, dict[str, Mapping[int, Mapping[str, float]]]()
        for bundle in family.values():
            if bundle.digest not in done:
                done[bundle.digest] = shuffled_loss(
                    bundle, study.data, study.latents, "val", 4, self.sizes.seed
                )
        return {k: done[bundle.digest][k]["true"] for k, bundle in family.items()}

    def _generated(self, name: str, bundle: Bundle, k: int) -> Float[Tensor, "n d"]:
        """Return features of patches generated for the conditions of a scale; save the first."""
        pixels = patches(bundle, self.conditions[k], k, self.sizes)
        pairs = [
            [example.image, patch]
            for example, patch in zip(self.conditions[k], pixels, strict=True)
        ]
        rows = [[image for pair in pairs[i::8][:5] for image in pair] for i in range(8)]
        images.write_png(f"{self.study.work}/{name}-{k}.png", images.sheet(rows))
        return self.features(list(pixels))


@torch.no_grad()
def patches(
    bundle: Bundle, examples: Sequence[ReferenceExample], k: int, sizes: Sizes
) -> np.ndarray:
    """Generate patches of a scale for the grids of examples, with noise at (scale, index)."""
    grids = torch.from_numpy(np.stack([one.grid for one in examples])).float().movedim(-1, 1)
    noise = normal(
        bundle.patch.latent, sizes.seed, "benchmark", [(k, i) for i in range(len(examples))]
    )
    denoiser = guided(bundle.denoiser(), sizes.guidance, bundle.summarizer.null(1))
    batches = []
    for cells, begin in zip(grids.split(AT_ONCE), noise.split(AT_ONCE), strict=True):
        estimate = bind_context(denoiser, bundle.summarizer(cells, torch.full((len(cells),), k)))
        latent = solve(estimate, begin, bundle.schedule, "ddim", sizes.sampler_steps)
        batches.append(images.to_uint8(bundle.vae.decode(latent)))
    return np.concatenate(batches)


def intervals(
    real: Float[Tensor, "n d"], sets: Sequence[Float[Tensor, "m d"]], seed: int
) -> list[tuple[float, float, float]]:
    """Return KID x 1000 of each set, and of the last minus the first, with 95 % intervals.

    By half-sampling without replacement: a bootstrap would repeat samples, which are close to
    themselves. All sets omit the same indices.
    """
    rng = np.random.default_rng(seed)

    def distances(of: Tensor, at: Any) -> list[float]:
        values = [1000 * kernel_distance(features[at], of) for features in sets]
        return [*values, values[-1] - values[0]]

    drawn = [
        distances(real[_half(rng, len(real))], _half(rng, len(sets[0]))) for _ in range(DRAWS)
    ]  # fmt: skip
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    whole = distances(real, slice(None))
    return [tuple(map(float, three)) for three in zip(whole, low, high, strict=True)]  # type: ignore[misc]


def _half(rng: np.random.Generator, count: int) -> Tensor:
    return torch.from_numpy(rng.permutation(count)[: count // 2])
