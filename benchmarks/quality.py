"""Compare images of several sampling settings with real tiles.

An order is carried out for several seeds. Its figures: the cross-scale error, both with A
inside each window and across their borders; the seam ratio and window lines; the kernel
distance (KID) of its patches to real tiles, in the features of the encoder that made the
bundle's embeddings.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.page import Section
from raylarge import order as orders
from raylarge import storage
from raylarge.evaluate.references import ReferenceExample, references
from raylarge.geometry import windows
from raylarge.images import to_float
from raylarge.metrics.consistency import cross_scale_error, window_error
from raylarge.metrics.kernel import kernel_distances
from raylarge.metrics.lines import MIN_WINDOWS, window_lines
from raylarge.metrics.seams import seam_ratio
from raylarge.models import bundle as bundles
from raylarge.models import ssl
from raylarge.models.bundle import Bundle
from raylarge.models.prior import GridPrior
from raylarge.order import Condition, Order
from raylarge.sampling import joint
from raylarge.sampling.plan import run
from raylarge.workers.worker import Worker

HEADER = (
    "seconds",
    "error in windows",
    "across borders",
    "seam ratio",
    "window lines",
    "KID x 1000",
)
FINE = ("null", "independent", "inversion", "prior")
PRIOR_SECONDS = 90


@dataclass
class ImageJudge:
    """Samples images with a trained bundle and compares them with real tiles.

    Attributes:
        bundle: what makes the images.
        encoder: pixels uint8 [n, P, P, 3] -> features [n, d].
        tiles: real examples of scale 0.
        regions: real examples as large as the images, of which the windows' conditions are.
        side: of the images, in patches.
        seeds: images per order.
        steps: of the sampler.
    """

    bundle: Bundle
    encoder: Callable[[np.ndarray], np.ndarray]
    tiles: Sequence[ReferenceExample]
    regions: Sequence[ReferenceExample]
    side: int
    seeds: int
    steps: int = 20

    @classmethod
    def open(cls, bundle: str, data: str, side: int, seeds: int) -> ImageJudge:
        """Open a bundle and the data that it was trained on."""
        data = storage.absolute(data)
        encoder = ssl.load(bundles.facts(bundle)["encoder"]["name"])
        regions = references(data, side.bit_length() - 1, None)
        tiles = references(data, 0, None)
        return cls(bundles.load(bundle), encoder, tiles, regions, side, seeds)

    @property
    def real(self) -> Tensor:
        """Features of the real tiles: their embeddings."""
        return torch.from_numpy(np.stack([tile.grid[0, 0] for tile in self.tiles])).float()

    def row(self, name: str, **values: Any) -> list[str]:
        """Return the figures of an order, averaged over seeds."""
        figures = [self._judged(self._order(values, seed)) for seed in range(self.seeds)]
        means = (statistics.mean(one[i] for one in figures) for i in range(5))
        seconds, inside, across, seam, lines = means
        features = torch.cat([one[5] for one in figures])
        kid, spread = kernel_distances(features, self.real, size=min(100, len(features)))
        errors = [f"{error:.3f}" if error >= 0 else "–" for error in (inside, across)]
        distance = f"{1000 * kid:.1f} ± {1000 * spread:.1f}"
        grid = f"{lines:.2f}" if lines >= 0 else "–"
        return [name, f"{seconds:.1f}", *errors, f"{seam:.3f}", grid, distance]

    def _order(self, values: dict[str, Any], seed: int) -> Order:
        """Return an order, by default conditioned on the (seed + 1)-th region by tissue."""
        values = {"size": self.side * self.bundle.patch.side_px, "seed": seed, **values}
        condition = values.pop("condition", None)
        values["sampler"] = {"steps": self.steps, "clamp": True, **values.get("sampler", {})}
        if condition is None:
            regions = sorted(self.regions, key=lambda region: -region.tissue)
            condition = Condition.of(regions[seed % len(regions)].grid)
        return orders.parse(values).replace(condition=condition)

    def _judged(self, order: Order) -> tuple[float, float, float, float, float, Tensor]:
        patch, began = self.bundle.patch, time.perf_counter()
        result = run(joint.plan(order, patch), Worker(self.bundle).answer)
        pixels = result.image
        seconds, image = time.perf_counter() - began, to_float(pixels)
        inside = across = -1.0
        if result.frames is not None:
            inside, across = (
                f(image, result.frames[-1]) for f in (window_error, cross_scale_error)
            )
        side = patch.side_px
        cut = np.stack(
            [pixels[r : r + side, c : c + side] for r, c in windows(order.size, side, side)]
        )
        features = torch.from_numpy(self.encoder(cut)).float()
        lines = window_lines(image, side) if max(order.size) >= MIN_WINDOWS * side else -1.0
        return seconds, inside, across, seam_ratio(image, side), lines, features

    def train_prior(self, seconds: float) -> None:
        """Train a small grid prior on the grids of real regions for the bundle."""
        torch.manual_seed(0)
        grids = torch.from_numpy(np.stack([one.grid for one in self.regions])).float()
        grids = grids.movedim(-1, 1)
        vectors = grids.mean(dim=(2, 3))
        prior = GridPrior(grids.shape[1], vectors.shape[1], self.side, width=128, blocks=4)
        prior.standardise(grids, vectors)
        adam, ended = torch.optim.Adam(prior.parameters(), 1e-3), time.monotonic() + seconds
        while time.monotonic() < ended:
            some = torch.randint(len(grids), (32,))
            clean, t = prior.to_standard(grids[some]), torch.randint(1000, (32,))
            conditions = vectors[some] * (torch.rand(32, 1) > 0.5)
            noisy = prior.schedule.noised(clean, torch.randn_like(clean), t)
            loss = (prior(noisy, t, conditions) - clean).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        self.bundle = dataclasses.replace(self.bundle, prior=prior.eval())


def conditions(judge: ImageJudge, seconds: float = PRIOR_SECONDS) -> Section:
    """Compare conditions of windows for a guide from the CDM."""
    judge.train_prior(seconds)
    rows = [
        judge.row(fine, condition=Condition(kind="cdm", fine=fine)) for fine in FINE
    ]  # fmt: skip
    free = Condition(kind="cdm", fine="null")
    rows.append(judge.row("null, K = 0", condition=free, sampler={"corrections": 0}))
    return _section(
        judge, "Conditions of windows under a guide that the CDM drew", "fine", rows,
        f"`prior` is a grid prior of 128 channels trained here for {seconds:g} s, drawn "
        f"without a vector: it knows nothing of the guide.",
    )  # fmt: skip


def constraints(judge: ImageJudge) -> Section:
    """Compare constraints, autoencoders of the correction, and seam removal."""
    ways: dict[str, dict[str, Any]] = {
        "window": {},
        "mosaic": {"sampler": {"constraint": "mosaic"}},
        "backprop (S1)": {"sampler": {"correction": "backprop"}},
        "none": {"sampler": {"corrections": 0}},
        "window, seams removed": {"refine": True},
        "strided, 4 per side, no guide": {"algorithm": "strided"},
    }
    rows = [judge.row(name, **way) for name, way in ways.items()]
    return _section(judge, "Constraint and seams, embeddings of real regions", "way", rows)


def trading(judge: ImageJudge) -> Section:
    """Compare cheaper settings."""
    ways: dict[str, dict[str, Any]] = {
        "as it is": {},
        "interval=[0.2,0.8]": {"interval": [0.2, 0.8]},
        "interval=[0.4,0.8]": {"interval": [0.4, 0.8]},
        "every=2": {"correct_every": 2},
        "every=4": {"correct_every": 4},
        "every=2 interval=[0.2,0.8]": {"correct_every": 2, "interval": [0.2, 0.8]},
    }
    rows = [judge.row(name, sampler=way) for name, way in ways.items()]
    return _section(judge, "Cheaper sampling, embeddings of real regions", "sampler", rows)


def _section(
    judge: ImageJudge, title: str, first: str, rows: Sequence[list[str]], *more: str
) -> Section:
    side = judge.side * judge.bundle.patch.side_px
    note = (
        f"{judge.seeds} images of {side}² each, S = {judge.steps}, K = 1 unless said; KID "
        f"against {len(judge.real)} real tiles, ± over subsets of 100. The trained bundle is "
        f"small and was trained for minutes: figures compare ways, they do not praise pictures."
    )
    return Section(title, [first, *HEADER], list(rows), [note, *more])
