"""Baselines of the data benchmark: a loop over read_region, and CLAM's data set in a DataLoader.

CLAM (github.com/mahmoodlab/CLAM, `extract_features_fp.py`, `dataset_h5.py`): the slide is opened
once and forked into the workers; `__getitem__` reads one tile by read_region, converts it, resizes
it where the slide is finer (`custom_downsample`), and brings it into the encoder's shape with
PIL, one by one; the main process runs the encoder. Its coordinates run down columns, and so do
those of both here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openslide
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.data_makers import Timing
from benchmarks.data_slides import PATCH_PX, Slides
from raylarge.models import ssl, ssl_networks
from raylarge.models.ssl_cards import EncoderCard

Transform = Callable[[Image.Image], Tensor]
Encode = Callable[[np.ndarray], Any]


def cells(slides: Slides) -> Iterator[tuple[int, int]]:
    """Return (row, column) of all base tiles in CLAM's order."""
    rows, columns = slides.grid
    return ((row, column) for column in range(columns) for row in range(rows))


def tile_image(slide: openslide.OpenSlide, cell: tuple[int, int], zoom: int) -> Image.Image:
    """Read one base tile as CLAM does."""
    side = PATCH_PX * zoom
    region = slide.read_region((cell[1] * side, cell[0] * side), 0, (side, side)).convert("RGB")
    return region if zoom == 1 else region.resize((PATCH_PX, PATCH_PX))


def loop(slides: Slides, encode: Encode | None, batch: int) -> Timing:
    """Read tile by tile in one process; encode in batches."""
    clock, waiting = _Clock(slides.tiles), []
    for path in slides.paths:
        with openslide.OpenSlide(path) as slide:
            for cell in cells(slides):
                waiting.append(np.asarray(tile_image(slide, cell, slides.zoom)))
                if len(waiting) == batch:
                    _give(waiting, encode, clock)
    if waiting:
        _give(waiting, encode, clock)
    return clock.timing()


def _give(waiting: list[np.ndarray], encode: Encode | None, clock: _Clock) -> None:
    if encode is not None:
        encode(np.stack(waiting))
    clock.done(len(waiting))
    waiting.clear()


class Bag(Dataset[tuple[Tensor, np.ndarray]]):
    """CLAM's `Whole_Slide_Bag_FP`."""

    def __init__(self, path: str, slides: Slides, transform: Transform) -> None:
        """Open the slide; workers inherit it by fork."""
        self._slide = openslide.OpenSlide(path)
        self.cells = list(cells(slides))
        self._zoom, self._transform = slides.zoom, transform

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, index: int) -> tuple[Tensor, np.ndarray]:
        cell = self.cells[index]
        image = self._transform(tile_image(self._slide, cell, self._zoom)).unsqueeze(0)
        return image, np.array(cell)


def clam(slides: Slides, encoder: str | None, batch: int, workers: int) -> Timing:
    """Read by the workers of a DataLoader per slide; encode in this process."""
    transform, network = pixels_alone, None
    if encoder is not None:
        transform, network = clam_encoder(encoder)
    clock = _Clock(slides.tiles)
    for path in slides.paths:
        loader = DataLoader(
            Bag(path, slides, transform),
            batch_size=batch,
            num_workers=workers,
            collate_fn=_collated,
            multiprocessing_context="fork" if workers else None,
        )
        for images, _ in loader:
            if network is not None:
                with torch.inference_mode():
                    network(images).numpy()
            clock.done(len(images))
    return clock.timing()


def clam_encoder(name: str) -> tuple[Transform, ssl_networks.Network]:
    """CLAM's encoder: PIL resizes and standardises each tile."""
    card: EncoderCard = ssl.card(name)
    modes = transforms.InterpolationMode
    mode = modes.BICUBIC if card.resample == "bicubic" else modes.BILINEAR
    steps = [
        transforms.Resize(card.input_px, interpolation=mode),
        transforms.ToTensor(),
        transforms.Normalize(card.mean, card.std),
    ]
    return transforms.Compose(steps), ssl_networks.load_builtin(card)


def pixels_alone(image: Image.Image) -> Tensor:
    """Return a tile unchanged."""
    return torch.from_numpy(np.array(image))


def _collated(batch: list[tuple[Tensor, np.ndarray]]) -> tuple[Tensor, np.ndarray]:
    return torch.cat([image for image, _ in batch]), np.stack([cell for _, cell in batch])


class _Clock:
    """Times batches; CPU time counts workers that have ended."""

    def __init__(self, tiles: int) -> None:
        self._tiles = tiles
        self._cpu, self._began = _cpu_s(), time.time()
        self._first: tuple[float, int] | None = None
        self._seen = 0

    def done(self, count: int) -> None:
        """Count a batch."""
        self._seen += count
        if self._first is None:
            self._first = (time.time(), self._seen)

    def timing(self) -> Timing:
        """Return the timing."""
        now = time.time()
        if self._first is None or self._seen != self._tiles:
            raise AssertionError(f"{self._seen} of {self._tiles} tiles were read")
        first, seen = self._first
        later = self._seen - seen
        steady = later / (now - first) if later else self._seen / (now - self._began)
        whole_s = now - self._began
        return Timing(self._seen, whole_s, first - self._began, steady, _cpu_s() - self._cpu)


def _cpu_s() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
