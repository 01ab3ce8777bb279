"""An order: one request for an image, a frozen value that travels as JSON.

    {"size": 4096, "seed": 7, "condition": {"kind": "cdm"}, "recipe": "released"}

`recipe` names the sampler's settings as the paper states them or as its code was released;
single settings override it (`sampler.steps`). Two equal orders give the same pixels.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from raylarge import config, storage
from raylarge.errors import UserError
from raylarge.geometry import Patch, Scale, guide_scale

LIMIT_PX = 1 << 17
LIMIT_BATCH = 1024
SOLVERS = ("ddim", "plms", "dpm++", "unipc")


@dataclass(frozen=True)
class Sampler:
    """Settings of the sampler and of the correction of Algorithm S2.

    Attributes:
        steps: steps S.
        solver: `ddim`; for separate patches also `plms`, `dpm++` or `unipc` (eta 0).
        eta: 0 is deterministic DDIM, 1 the ancestral variance.
        guidance: w of u + w (c - u).
        inner: corrections K in every step; 0 samples without the constraint.
        rate: the correction's learning rate, lambda.
        unit: divide e_img, e and g by their largest magnitude per window (released code).
        clamp: clamp the guide's frames to [-1, 1] before they constrain (released code).
        derivative: `jvp` (forward mode) or `difference` (the papers' finite difference, for
            float32 only: in half precision it cancels).
        step: the finite difference's delta and zeta.
    """

    steps: int = 50
    solver: str = "ddim"
    eta: float = 0.0
    guidance: float = 2.0
    inner: int = 1
    rate: float = 0.5
    unit: bool = False
    clamp: bool = False
    derivative: str = "jvp"
    step: float = 0.005


RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "steps": 20,
        "inner": 10,
        "eta": 1.0,
        "guidance": 3.0,
        "unit": True,
        "clamp": True,
    },
}
"""`paper`: supplement S3.2. `released`: the authors' code (its guidance 2 is 3 in our form)."""


@dataclass(frozen=True)
class Condition:
    """What the image should show.

    Attributes:
        kind: `null` (nothing), `cdm` (tokens drawn by the CDM), `embeddings` (a grid of raw
            base embeddings, or one such grid per patch).
        fine: under `cdm`, how the fine windows are conditioned: `null` or `independent` draws.
        draw: how the CDM draws: `paper` (50 steps of DDIM) or `released` (200 respaced steps).
        data: base64 of little-endian float16 values in row-major order.
        shape: (rows, columns, channels), with the number of patches in front for patches.
    """

    kind: str = "null"
    fine: str = "null"
    draw: str = "paper"
    data: str = ""
    shape: Any = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(side) for side in self.shape))
        if self.kind not in ("null", "cdm", "embeddings"):
            raise UserError(f"condition.kind '{self.kind}' is not null, cdm or embeddings.")
        if self.fine not in ("null", "independent"):
            raise UserError(f"condition.fine '{self.fine}' is not null or independent.")
        if self.draw not in RECIPES:
            raise UserError(f"condition.draw '{self.draw}' is not {' or '.join(RECIPES)}.")

    @classmethod
    def of(cls, grid: np.ndarray) -> Condition:
        """A condition on raw embeddings, [rows, columns, C] or [patches, rows, columns, C]."""
        packed = base64.b64encode(np.ascontiguousarray(grid, dtype="<f2").tobytes()).decode()
        return cls(kind="embeddings", data=packed, shape=grid.shape)

    @property
    def fine_kind(self) -> str:
        """How windows under a guide are conditioned: `null`, `cdm` or `embeddings`."""
        drawn = "cdm" if self.fine == "independent" else "null"
        return drawn if self.kind == "cdm" else self.kind

    def grid(self) -> np.ndarray:
        """The embeddings as float32.

        Raises:
            UserError: the data do not fill the shape.
        """
        try:
            flat = np.frombuffer(base64.b64decode(self.data, validate=True), dtype="<f2")
            return flat.reshape(self.shape).astype(np.float32)
        except ValueError as error:
            raise UserError(
                f"condition.data does not hold the float16 values of shape {self.shape}."
            ) from error


@dataclass(frozen=True)
class Strided:
    """How windows overlap where `algorithm` is strided (Graikos et al.).

    Attributes:
        share: windows begin every side / share; 4 is the papers' stride of 16 latent cells.
        average: of the estimates of x_0: `gaussian` (paper) or `uniform` (released code).
        coarser: average the embeddings over n x n patches first (their figure 10).
    """

    share: int = 4
    average: str = "gaussian"
    coarser: int = 1


@dataclass(frozen=True)
class Order:
    """One request for an image.

    Attributes:
        size: side in pixels, or (rows, columns); also written `4096x6144`.
        count: 0 for one large image; n for n separate patches at `scale`.
        scale: the scale whose pixels are wanted (0 is the base).
        seed: all randomness follows from it.
        batch: windows per batch; part of the order because it decides the last bits.
        chunk: steps per request, the grain of resumption.
        algorithm: of a large image: `joint` (ZoomLDM) or `strided` (Graikos et al.).
        refine: remove the seams between the patches of a joint image, in six more steps.
        levels: scales from the guide's down to `scale`, such as 6,4,2,0; by default these two.
        recipe: the name the sampler's settings started from.
    """

    size: Any = 0
    count: int = 0
    scale: int = 0
    seed: int = 0
    batch: int = 16
    chunk: int = 10
    algorithm: str = "joint"
    refine: bool = False
    levels: Any = ""
    recipe: str = "paper"
    sampler: Sampler = field(default_factory=Sampler)
    strided: Strided = field(default_factory=Strided)
    condition: Condition = field(default_factory=Condition)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.size))
        object.__setattr__(self, "levels", _levels(self.levels))

    def guide(self, patch: Patch) -> Scale:
        """The scale of the guide: the one at which a single patch covers the canvas."""
        return Scale(self.scale + guide_scale(self.size, patch.side_px).k)

    def levels_of(self, patch: Patch) -> tuple[int, ...]:
        """The scales that are sampled, coarse to fine; one alone where a patch covers all."""
        top = self.guide(patch).k
        return self.levels or ((top, self.scale) if top > self.scale else (self.scale,))

    def brief(self) -> Order:
        """The order without the bulk of its condition, for requests that do not need it."""
        return dataclasses.replace(self, condition=Condition())

    def as_json(self) -> dict[str, Any]:
        """The order as a JSON document; `parse` reads it back."""
        document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return document

    @property
    def digest(self) -> str:
        """A short name that equal orders share."""
        return storage.digest(json.dumps(self.as_json(), sort_keys=True).encode())


def parse(values: Mapping[str, Any]) -> Order:
    """An order from JSON or configuration values; the recipe fills what they leave open.

    Raises:
        UserError: an unknown recipe, key or kind, or a value of the wrong type.
    """
    if "${" in json.dumps(dict(values), default=str):  # would be resolved, environment included
        raise UserError("an order holds plain values, no ${...} expressions.")
    recipe = str(values.get("recipe", "paper"))
    if recipe not in RECIPES:
        raise UserError(f"there is no recipe '{recipe}'; choose one of: {', '.join(RECIPES)}.")
    settings = {"sampler": RECIPES[recipe], "condition": {"draw": recipe}}
    return config.build(Order, settings, dict(values))


def check(order: Order, patch: Patch) -> None:
    """Refuse an order that a bundle's patches cannot carry out.

    Raises:
        UserError: what is wrong and what would be right.
    """
    if order.algorithm not in ("joint", "strided"):
        raise UserError(f"order.algorithm '{order.algorithm}' is not joint or strided.")
    if order.count:
        _check_patches(order, patch)
    elif order.algorithm == "strided":
        _check_strided(order, patch)
    else:
        _check_canvas(order, patch)
    sampler = order.sampler
    if sampler.solver not in SOLVERS:
        raise UserError(f"sampler.solver '{sampler.solver}' is not {', '.join(SOLVERS)}.")
    if sampler.solver != "ddim" and (not order.count or sampler.eta):
        raise UserError(
            f"sampler.solver {sampler.solver} is for separate patches (order.count) with eta 0."
        )
    if sampler.derivative not in ("jvp", "difference"):
        raise UserError(f"sampler.derivative '{sampler.derivative}' is not jvp or difference.")
    if min(order.batch, order.chunk, sampler.steps) < 1 or min(order.seed, sampler.inner) < 0:
        raise UserError("batch, chunk and sampler.steps start at 1, seed and sampler.inner at 0.")
    if order.batch > LIMIT_BATCH:
        raise UserError(
            f"batch {order.batch} is more than {LIMIT_BATCH}; short batches are padded."
        )
    if order.seed >= 1 << 64:
        raise UserError(f"seed {order.seed} does not fit 64 bits; choose one below 2**64.")


def _check_patches(order: Order, patch: Patch) -> None:
    if order.count < 0 or not 0 <= order.scale < patch.scales:
        raise UserError(
            f"order.count {order.count} must be positive and order.scale {order.scale} one of the "
            f"bundle's scales 0 to {patch.scales - 1}."
        )
    _check_condition(order, (order.count, 1 << order.scale, 1 << order.scale))


def _check_canvas(order: Order, patch: Patch) -> None:
    side = patch.side_px
    if any(length <= 0 or length % side or length > LIMIT_PX for length in order.size):
        raise UserError(
            f"order.size {order.size} must be positive multiples of the patch side {side}, "
            f"at most {LIMIT_PX}."
        )
    top = order.guide(patch).k
    if order.scale < 0 or top >= patch.scales:
        largest = side << max(0, patch.scales - 1 - order.scale)
        raise UserError(
            f"order.size {order.size} at scale {order.scale} needs a guide at scale {top}, but "
            f"the bundle knows scales 0 to {patch.scales - 1}; the largest side is {largest}."
        )
    levels = order.levels_of(patch)
    if levels[0] != top or levels[-1] != order.scale or list(levels) != sorted({*levels})[::-1]:
        raise UserError(
            f"order.levels {levels} must fall from the guide's scale {top} to {order.scale}."
        )
    for above, below in pairwise(levels):
        if side >> (above - below) == 0:
            raise UserError(
                f"order.levels {levels}: a window at scale {below} has no pixel of its own at "
                f"scale {above}; put a level between them, such as {(above + below) // 2}."
            )
    cells = 1 << order.scale
    _check_condition(order, tuple(length // side * cells for length in order.size))


def _check_strided(order: Order, patch: Patch) -> None:
    side, how = patch.side_px, order.strided
    if any(n < side or n % patch.factor or n > LIMIT_PX for n in order.size):
        raise UserError(
            f"order.size {order.size} must be multiples of {patch.factor} from the patch side "
            f"{side} to {LIMIT_PX}."
        )
    if how.average not in ("gaussian", "uniform") or how.coarser < 1:
        raise UserError(
            f"strided.average '{how.average}' is gaussian or uniform, and strided.coarser "
            f"{how.coarser} starts at 1."
        )
    if how.share < 1 or patch.side_lat % how.share:
        raise UserError(
            f"strided.share {how.share} must divide the {patch.side_lat} latent cells of a patch."
        )
    if not 0 <= order.scale < patch.scales:
        raise UserError(f"order.scale {order.scale} is not one of 0 to {patch.scales - 1}.")
    if order.condition.kind == "cdm":
        raise UserError("the CDM draws no embeddings to interpolate: use algorithm=joint.")
    cells = tuple(-(-n // side) << order.scale for n in order.size)
    _check_condition(order, cells)


def _check_condition(order: Order, wanted: tuple[int, ...]) -> None:
    shape = order.condition.shape
    if order.condition.kind == "embeddings" and shape[:-1] != wanted:
        raise UserError(
            f"condition.shape {shape} does not fit: this order takes {wanted} embeddings."
        )


def _levels(value: Any) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(int(scale) for scale in parts if scale != "")
    except (TypeError, ValueError) as error:
        raise UserError(f"levels '{value}' is no list of scales such as 6,4,2,0.") from error


def _size(value: Any) -> tuple[int, int]:
    parts = value.split("x") if isinstance(value, str) else value
    try:
        sides = [int(side) for side in parts] if isinstance(parts, (list, tuple)) else [int(parts)]
        rows, columns = sides * 2 if len(sides) == 1 else sides
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"size '{value}' is not a number of pixels such as 4096 or 4096x6144."
        ) from error
    return rows, columns
