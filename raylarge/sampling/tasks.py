"""Tasks: the requests of a plan, and what a worker replies to each.

    LoadSource  InvertImage  SamplePrior  EncodeContext
    DenoiseGuide  DenoiseWindows  DenoiseBand  DenoiseMosaicRow  ->  DecodeBand  DecodePatches

A task is a frozen value. With the replies that a worker is given by name, it determines its reply.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from raylarge.order import Order

Cells = tuple[tuple[int, int], ...]
"""(row, column) of windows, in windows of their scale."""


@dataclass(frozen=True)
class Task:
    """One request.

    Attributes:
        order: without its payload, except in LoadSource, SamplePrior, and EncodeContext from
            embeddings.
    """

    order: Order


@dataclass(frozen=True)
class EncodeContext(Task):
    """Context tokens of some windows at a scale -> [B, n, D].

    Inputs: `grid`, the embeddings [C, rows, columns], under the kinds `inverted` and `prior`.

    Attributes:
        kind: as in `order.Condition`.
        interpolated: reply with the raw embedding [n, C] interpolated at each window's origin;
            `windows` are then in latent cells of the canvas.
    """

    kind: str
    scale: int
    windows: Cells
    interpolated: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class SamplePrior(Task):
    """The grid prior's sample for the order's vector -> raw grid [C, rows, columns]."""


@dataclass(frozen=True)
class LoadSource(Task):
    """The order's own low-resolution image -> float32 [3, rows, columns] in [-1, 1]."""


@dataclass(frozen=True)
class InvertImage(Task):
    """The embeddings that explain an image at a scale -> raw grid [C, rows, columns].

    Inputs: `image` [3, rows, columns], or the guide's frames, of which the last one is taken.
    """

    scale: int


@dataclass(frozen=True)
class DenoiseGuide(Task):
    """The coarse image's trajectory -> [S + 1, 3, P, P]: S estimates, then the image itself.

    Inputs: `tokens`.
    """

    scale: int


@dataclass(frozen=True)
class DenoiseWindows(Task):
    """A batch of windows of a scale through steps first .. last - 1 -> latents [B, c, p, p].

    Inputs: `tokens`; `target`, under a coarser level the frames of the window above from step
    `frames_from` on, or the image of the order; `latents`, after the first chunk of steps.

    Attributes:
        guided_by: scale of the target; None samples without the constraint.
        traced: reply in `Parts`: part i holds window i's decoded estimates [steps, 3, P, P],
            which guide the level below.
        follows_image: the target is the order's image.
    """

    scale: int
    windows: Cells
    first: int
    last: int
    guided_by: int | None
    frames_from: int = 0
    traced: bool = field(default=False, kw_only=True)
    follows_image: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class DenoiseBand(Task):
    """One step of one band of a canvas of overlapping windows -> [2 c + 1, rows, W].

    Inputs: `vectors`, the embeddings of the windows, if there are any; `latents`, at step 0 of
    seam removal those of the batches that `groups` places; `neighbours`, at later steps the
    replies of these bands at the step before. After the last step the task has no windows and
    its reply is the band's own rows of the finished latent, [c, rows, W]. (`sampling/bands.py`)

    Attributes:
        windows: (row, column) origins, in latent cells of the canvas, of those that begin here.
        neighbours: bands of the step before, from the top.
        refine: seam removal instead of strided sampling.
    """

    band: int
    step: int
    windows: Cells
    neighbours: tuple[int, ...] = ()
    groups: tuple[Cells, ...] = ()
    refine: bool = field(kw_only=True)


@dataclass(frozen=True)
class DenoiseMosaicRow(Task):
    """A row of windows from one correction of the mosaic to the next -> latents [n, c, p, p].

    Inputs: `tokens`; `target`, the guide's frames or the order's image; after the first request
    of the row also `latents`, `images` and `shares`, the last of all `neighbours`. Every reply
    but the last is in `Parts`: the windows' images [n, 3, P, P], and the row's share of the
    downsampled mosaic [3, rows, columns]. (`sampling/mosaic.py`)

    Attributes:
        row: of windows, from the top.
        correction_index: counts corrections over all steps; at the last one the latents are final.
        neighbours: rows whose images reach into this row's pixels, from the top.
        follows_image: the target is the order's image.
    """

    scale: int
    row: int
    correction_index: int
    guided_by: int
    neighbours: tuple[int, ...] = ()
    follows_image: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class DecodeBand(Task):
    """Pixel rows top .. bottom - 1 of the canvas, blended -> uint8 [rows, columns, 3].

    Inputs: `latents`, of the batches whose windows `windows` places, or the finished rows of
    `bands`.
    """

    windows: tuple[Cells, ...]
    top: int
    bottom: int
    bands: tuple[int, ...] = ()


@dataclass(frozen=True)
class DecodePatches(Task):
    """Separate patches, each decoded alone -> uint8 [B, P, P, 3]. Inputs: `latents`."""


class Parts(NamedTuple):
    """A reply in parts that can be used one by one.

    Requests name `whole` by the request's id, and part i by id#i.
    """

    whole: Tensor
    parts: tuple[Tensor, ...]
