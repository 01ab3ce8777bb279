"""How the published data sets of ZoomLDM lie on a disk, and one item of them.

    brca       ROOT/{mag}/{i // 1_000_000}/{i}_vae.npy, _uni_grid.npy (channels first), _img.npy
    naip       ROOT/{mag}/{i}_vae.npy, {i}_dino_grid.npy (channels last), {i}.jpg
    *-demo     ROOT/data/{mag}/{i}.jpg, {i}_ssl_feat.npy: the sets of 16 items on the hub

An item comes out with its grid by row, column and channel, raw, and pooled as `shard` pools it.
Source: ldm/data/brca.py and naip.py of github.com/cvlab-stonybrook/ZoomLDM.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float16, Shaped
from PIL import Image

from raylarge import storage
from raylarge.data.shard import GRID_SIDE, pooled
from raylarge.errors import UserError
from raylarge.slides.mpp import AERIAL_BASE_MPP, BASE_MPP

PATCH_PX = 256
LATENT = (3, 64, 64)


class Unfit(Exception):
    """Why an item is left out; the sets are known to hold latents of a wrong shape."""


@dataclass(frozen=True)
class Layout:
    """One set.

    Attributes:
        mags: folders of the scales, the base first.
        folder: of a scale; `{part}` is `i // 1_000_000`.
        latent: name of an item's latent; empty: there is none.
        grid: name of an item's embeddings.
        image: name of an item's image.
        axes: of a grid file: `first` (channels, cells), `last` (cells, channels) or `either`.
        encoder: that made the embeddings.
        base_mpp: micrometres per pixel of scale 0.
    """

    mags: tuple[str, ...]
    folder: str
    latent: str
    grid: str
    image: str
    axes: str
    encoder: str
    base_mpp: float

    def file(self, table: str) -> str:
        """Name of the file that EXAMPLES or LATENTS are made of."""
        return self.image if table == "examples" else self.latent

    def parts(self, source: str, mag: str) -> list[int]:
        """The folders `i // 1_000_000` of a scale that stand; [0] where it is not divided."""
        if "{part}" not in self.folder:
            return [0]
        names = [one.name for one in storage.entries(storage.join(source, mag))]
        return sorted(int(name) for name in names if name.isdigit())


_BRCA = ("20x", "10x", "5x", "2_5x", "1_25x", "0_625x", "0_3125x", "0_15625x")
_NAIP = ("1x", "2x", "3x", "4x")  # 1, 2, 4 and 8 m per pixel
_PLAIN, _DEMO, _FEAT = "{mag}", "data/{mag}", "{i}_ssl_feat.npy"
_DINO, _METRE = "dinov2_vitl14_reg", AERIAL_BASE_MPP
_NAMES = ("{i}_vae.npy", "{i}_uni_grid.npy", "{i}_img.npy")
LAYOUTS = {
    "brca": Layout(_BRCA, "{mag}/{part}", *_NAMES, "first", "uni", BASE_MPP),
    "naip": Layout(
        _NAIP, _PLAIN, "{i}_vae.npy", "{i}_dino_grid.npy", "{i}.jpg", "last", _DINO, _METRE
    ),
    "brca-demo": Layout(_BRCA, _DEMO, "", _FEAT, "{i}.jpg", "first", "uni", BASE_MPP),
    # Its grids have 64 cells at most, so the encoder's width tells which axis is which.
    "naip-demo": Layout(_NAIP, _DEMO, "", _FEAT, "{i}.jpg", "either", _DINO, _METRE),
}


def grid(
    layout: Layout, folder: str, i: int, scale: int, width: int
) -> Float16[np.ndarray, "rows columns {width}"]:
    """An item's raw embeddings by row and column, pooled where larger than 8 x 8.

    Raises:
        Unfit: no such file, a damaged one, not one cell per base tile, or values that are not
            finite.
        UserError: see `cells`.
    """
    vectors = cells(_array(folder, layout.grid.format(i=i)), width, layout.axes)
    side = math.isqrt(len(vectors))
    if side**2 != len(vectors) or side not in (1 << scale, min(1 << scale, GRID_SIDE)):
        raise Unfit(f"a grid of {len(vectors)} cells at scale {scale}")
    return pooled(_half(vectors.reshape(side, side, width), "grid"))


def cells(
    x: Shaped[np.ndarray, "..."], width: int, axes: str
) -> Shaped[np.ndarray, "cells {width}"]:
    """A grid as a file holds it, as one row per cell, row-major.

    The sets disagree: of BRCA's grids the first axis is the channel (one cell may come without
    its own axis), of NAIP's the last.

    Args:
        x: the file's array.
        width: of an embedding.
        axes: `first`, `last`, or `either` where only one of them can be the channel.

    Raises:
        UserError: the axis has another length: another encoder, or another set.
    """
    if x.ndim == 3 and x.shape[0] == 1:  # a batch of one
        x = x[0]
    if x.ndim == 1:
        x = x[None] if axes == "last" else x[:, None]
    if axes == "either":
        axes = "first" if x.shape[0] == width else "last"
    if x.ndim != 2 or x.shape[0 if axes == "first" else 1] != width:
        raise UserError(
            f"a grid has shape {x.shape}, but its {axes} axis should be the {width} channels of "
            "the encoder; say import= and encoder= as the set has it."
        )
    return x.T if axes == "first" else x


def latent(layout: Layout, folder: str, i: int) -> Float16[np.ndarray, "3 64 64"]:
    """An item's latent: as the encoder of VQ-f4 gives it, before quantisation.

    Raises:
        Unfit: no such file, a damaged one, of another shape, or with values that are not finite.
    """
    values = _array(folder, layout.latent.format(i=i))
    if values.shape != LATENT:
        raise Unfit(f"a latent of shape {values.shape}, not {LATENT}")
    return _half(values, "latent")


def image(layout: Layout, folder: str, i: int) -> bytes:
    """Return an item's image, as the bytes of its JPEG or PNG.

    Raises:
        Unfit: no such file, a damaged one, of another size, or neither 8-bit RGB nor grey.
    """
    name = layout.image.format(i=i)
    content = _content(folder, name)
    if name.endswith(".npy"):
        content = _loaded(content, name).tobytes()
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as picture:
            mode, size = picture.mode, picture.size
            if size == (PATCH_PX, PATCH_PX):
                picture.load()
    except Exception as error:  # of damaged files Pillow's decoders raise anything at all
        raise Unfit(f"{name} is no whole PNG or JPEG") from error
    if size != (PATCH_PX, PATCH_PX):
        raise Unfit(f"an image of {size[0]} x {size[1]} px, not {PATCH_PX}")
    if mode not in ("RGB", "L"):
        raise Unfit(f"an image of {mode} pixels, not 8-bit RGB or grey")
    return content


def _half(values: np.ndarray, name: str) -> Float16[np.ndarray, "..."]:
    """Return values as float16, which must hold them.

    Raises:
        Unfit: no numbers, NaN, infinity, or a value beyond float16.
    """
    if values.dtype.kind not in "fiu":
        raise Unfit(f"a {name} of {values.dtype}, not numbers")
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise Unfit(f"a {name} with NaN or values beyond float16")
    return half


def _array(folder: str, name: str) -> np.ndarray:
    return _loaded(_content(folder, name), name)


def _content(folder: str, name: str) -> bytes:
    path = storage.join(folder, name)
    try:
        return storage.read_bytes(path)
    except UserError as error:
        if storage.exists(path):
            raise
        raise Unfit(f"no {name}") from error


def _loaded(content: bytes, name: str) -> np.ndarray:
    try:
        array: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OverflowError, MemoryError) as error:
        raise Unfit(f"{name} is damaged: {error}") from error
    return array
