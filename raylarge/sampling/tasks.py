"""What may be asked of a worker: the whole vocabulary between plans and those who answer.

    Given  Invert  Imagine  Draw  ->  Guide  Windows  Band  Mosaic  ->  Decode  DecodeEach

A task is a value: it says all that its reply depends on, beside the replies that it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from raylarge.order import Order


@dataclass(frozen=True)
class Task:
    """What is asked. `order` is brief but for Given, and Draw from embeddings."""

    order: Order


@dataclass(frozen=True)
class EncodeContext(Task):
    """The context tokens of some windows at a scale -> [B, n, D].

    Takes no replies; under `inverted` and `prior` the grid of embeddings.
    `kind` is how, as in `order.Condition`. If `between`, the reply is the raw embedding [n, C]
    interpolated at each window's origin, in latent cells of the canvas.
    """

    kind: str
    scale: int
    windows: tuple[tuple[int, int], ...]
    between: bool = False


@dataclass(frozen=True)
class SamplePrior(Task):
    """The grid prior's draw for the order's vector -> raw grid [C, rows, columns]."""


@dataclass(frozen=True)
class LoadSource(Task):
    """The order's own low-resolution image -> float32 [3, rows, columns] in [-1, 1]."""


@dataclass(frozen=True)
class InvertImage(Task):
    """The embeddings that explain an image at a scale -> raw grid [C, rows, columns].

    Takes the image.
    """

    scale: int


@dataclass(frozen=True)
class DenoiseGuide(Task):
    """The coarse image's trajectory -> [S + 1, 3, P, P]: S estimates, then the image itself.

    Takes the guide's tokens.
    """

    scale: int


@dataclass(frozen=True)
class DenoiseWindows(Task):
    """A batch of windows of a scale through steps first .. last - 1 -> latents [B, c, p, p].

    Takes the batch's tokens; under a coarser level the frames of the one window above, from
    step `frames_from` on, or, if `given`, the image that all steps follow; after the first
    chunk the latents. If `traced`, the reply is in `Parts`: window i's frames [steps, 3, P, P],
    each step's decoded estimate, are part i, and guide the level below.
    """

    scale: int
    windows: tuple[tuple[int, int], ...]
    first: int
    last: int
    guided_by: int | None
    frames_from: int = 0
    traced: bool = False
    given: bool = False


@dataclass(frozen=True)
class DenoiseBand(Task):
    """One step of one band of a canvas of overlapping windows -> [2 c + 1, rows, W].

    Takes the band's embeddings (none if `vectors` is false), then at step 0 of seam removal
    the latents of the batches that `groups` places, later the replies of the bands `above`
    and around it at the step before. After the last step it takes no window and its reply is
    the band's own rows of the finished latent, [c, rows, W]. (`sampling/bands.py`)

    Attributes:
        windows: (row, column) origins, in latent cells of the canvas, of those that begin here.
        refine: seam removal; else strided sampling.
        vectors: whether windows have embeddings.
        neighbours: bands of the step before, from the top.
    """

    band: int
    step: int
    windows: tuple[tuple[int, int], ...]
    refine: bool
    vectors: bool
    neighbours: tuple[int, ...] = ()
    groups: tuple[tuple[tuple[int, int], ...], ...] = ()


@dataclass(frozen=True)
class DenoiseMosaicRow(Task):
    """A row of windows, from look to look of the arranged mosaic -> latents [n, c, p, p].

    Takes the row's tokens and what guides it (the guide's frames, or, if `given`, an image);
    after the first look the latents and images of the look before, then what the images of the
    `neighbours` came to when made small. Every reply but the last is in `Parts`: the windows'
    images [n, 3, P, P], and those made small [3, rows, columns]. (`sampling/mosaic.py`)

    Attributes:
        row: of windows, counted from the top.
        look: counts corrections over all steps; after the last one the latents are finished.
        neighbours: rows whose images reach into this one's pixels, from the top.
    """

    scale: int
    row: int
    look: int
    guided_by: int
    neighbours: tuple[int, ...] = ()
    given: bool = False


@dataclass(frozen=True)
class DecodeBand(Task):
    """Pixel rows top .. bottom - 1 of the canvas, blended -> uint8 [rows, columns, 3].

    Takes the latents that reach into the band: of batches, whose windows `windows` places, or
    the finished rows of `bands`.
    """

    windows: tuple[tuple[tuple[int, int], ...], ...]
    top: int
    bottom: int
    bands: tuple[int, ...] = ()


@dataclass(frozen=True)
class DecodePatches(Task):
    """Separate latents, each decoded alone -> uint8 [B, P, P, 3]. Takes the latents."""


class Parts(NamedTuple):
    """A reply in parts that others take one by one: `whole` as the request's id, part i as id#i."""

    whole: Tensor
    parts: tuple[Tensor, ...]
