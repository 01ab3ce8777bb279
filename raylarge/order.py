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
from typing import Any

import numpy as np

from raylarge import config, storage
from raylarge.config import choice, format_value, number, read
from raylarge.errors import UserError
from raylarge.geometry import Patch, Scale, guide_scale

ALWAYS = (0.0, 1.0)
SOLVERS = ("ddim", "plms", "dpm++", "unipc")
LIMIT_PX = 1 << 17
"""Longest side of an image in pixels."""
LIMIT_BATCH = 1024
MOST_STEPS = 999
"""Steps that a schedule of 1,000 timesteps has room for."""
LIMIT_GUIDANCE = 100
"""Far beyond use; larger factors leave the range of half precision, and then of float32."""
LIMIT_SCALE = 30
SIZE = "a number of pixels such as 4096 or 4096x6144"
LEVELS = "a list of scales such as 6,4,2,0"
SHAPE = "a list of sides such as [2,2,384]"


@dataclass(frozen=True)
class Sampler:
    """Settings of the sampler and of the correction of Algorithm S2.

    Attributes:
        steps: steps S.
        solver: `ddim`; for separate patches also `plms`, `dpm++` or `unipc` (eta 0).
        eta: 0 is deterministic DDIM, 1 the ancestral variance.
        guidance: w of u + w (c - u).
        corrections: K in every step; 0 samples without the constraint.
        correction: `encoder` (Algorithm S2) or `backprop` through the decoder (S1), as comparison.
        constraint: where A acts: inside each `window` (released code), or on the arranged
            `mosaic`, across the windows' borders (the paper's text).
        correction_lr: the correction's learning rate, lambda.
        normalize: divide e_img, e and g by their largest magnitude per window (released code).
        clamp: clamp the guide's frames to [-1, 1] before they constrain (released code).
        derivative: `jvp` (forward mode) or `difference` (the papers' finite difference, for
            float32 only: in half precision it cancels).
        fd_epsilon: the finite difference's delta and zeta.
        interval: shares of the schedule between which timesteps are guided; all by default. Not
            to guide the others saves half of their U-Net and changes the image.
        correct_every: correct in every n-th step alone; saves, and changes the image.
        small_autoencoder: correct with the bundle's small autoencoder; saves, and changes the
            image.
    """

    steps: int = number(50, 1, MOST_STEPS)
    solver: str = choice("ddim", SOLVERS)
    eta: float = number(0.0, 0, 1)
    guidance: float = number(2.0, 0, LIMIT_GUIDANCE)
    corrections: int = number(1, 0, 1000)
    correction: str = choice("encoder", ("encoder", "backprop"))
    constraint: str = choice("window", ("window", "mosaic"))
    correction_lr: float = number(0.5, 0, 100)
    normalize: bool = False
    clamp: bool = False
    derivative: str = choice("jvp", ("jvp", "difference"))
    fd_epsilon: float = number(0.005, 0, 1, above=True)
    interval: Any = field(default=ALWAYS, metadata={"kind": "two shares [from,to]"})
    correct_every: int = number(1, 1, MOST_STEPS)
    small_autoencoder: bool = False

    def __post_init__(self) -> None:
        config.check_fields(self)
        object.__setattr__(self, "interval", _interval(self.interval))

    @property
    def mosaic(self) -> bool:
        """Whether windows hear of each other through the constraint."""
        return self.constraint == "mosaic" and self.corrections > 0


RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "released": {
        "steps": 20,
        "corrections": 10,
        "eta": 1.0,
        "guidance": 3.0,
        "normalize": True,
        "clamp": True,
    },
}
"""`paper`: supplement S3.2. `released`: the authors' code (its guidance 2 is 3 in our form)."""
SUPERRES_RECIPES = {**RECIPES, "released": {**RECIPES["released"], "corrections": 5}}
"""The same for `algorithm=superres`, whose released code corrects 5 times in each step."""


KINDS = ("null", "cdm", "embeddings", "inverted", "prior")
FINE = {"null": "null", "independent": "cdm", "inversion": "inverted", "prior": "prior"}
"""What may condition windows under a guide that the CDM drew, and the kind that it is."""


@dataclass(frozen=True)
class Condition:
    """What the image should show.

    Attributes:
        kind: `null` (nothing), `cdm` (tokens drawn by the CDM), `embeddings` (a grid of raw
            base embeddings, or one such grid per patch), `inverted` (embeddings inferred from
            the image that is super-resolved), `prior` (a grid that the grid prior draws for a
            vector: a text's embedding, a label's).
        fine: under `cdm`, what conditions the fine windows: `null`, `independent` draws of the
            CDM, the `inversion` of the finished guide, or a draw of the `prior`.
        draw: how the CDM draws: `paper` (50 steps of DDIM) or `released` (200 respaced steps).
        data: base64 of little-endian float16 values in row-major order. Example: AAAAPA==.
        shape: (rows, columns, channels), with the number of patches in front for patches; of a
            vector its width alone. Without one a fine `prior` draws unconditionally.
            Example: [1,1,2].
        negative: the vector that the prior is led away from, packed as `data`. Example: AAAAPA==.
        prior_guidance: w of the prior's u + w (c - u).
        prior_steps: of the prior's DDIM.
        iterations: of an inversion, under kind `inverted` or fine `inversion`.
    """

    kind: str = choice("null", KINDS)
    fine: str = choice("null", tuple(FINE))
    draw: str = choice("paper", tuple(RECIPES))
    data: str = ""
    shape: Any = field(default=(), metadata={"kind": SHAPE})
    negative: str = ""
    prior_guidance: float = number(1.0, 0, LIMIT_GUIDANCE)
    prior_steps: int = number(50, 1, MOST_STEPS)
    iterations: int = number(200, 1, 100_000)

    def __post_init__(self) -> None:
        config.check_fields(self)
        sides = config.whole_numbers("condition.shape", self.shape, SHAPE, 1, 1 << 31)
        object.__setattr__(self, "shape", sides)

    @classmethod
    def of(cls, grid: np.ndarray) -> Condition:
        """A condition on raw embeddings, [rows, columns, C] or [patches, rows, columns, C]."""
        return cls(kind="embeddings", data=packed(grid), shape=grid.shape)

    @classmethod
    def of_vector(cls, vector: np.ndarray, negative: np.ndarray | None = None) -> Condition:
        """A condition on a vector [V] for the grid prior, and perhaps against another."""
        against = "" if negative is None else packed(negative)
        return cls(kind="prior", data=packed(vector), shape=vector.shape, negative=against)

    @property
    def fine_kind(self) -> str:
        """How windows under a guide are conditioned, as a `kind`."""
        return FINE[self.fine] if self.kind == "cdm" else self.kind

    def grid(self) -> np.ndarray:
        """The embeddings as float32.

        Raises:
            UserError: the data do not fill the shape.
        """
        return self._unpacked(self.data, "data")

    def against(self) -> np.ndarray | None:
        """The negative vector as float32, if there is one.

        Raises:
            UserError: it does not have the vector's width.
        """
        return self._unpacked(self.negative, "negative") if self.negative else None

    def _unpacked(self, data: str, name: str) -> np.ndarray:
        try:
            flat = np.frombuffer(base64.b64decode(data, validate=True), dtype="<f2")
            return flat.reshape(self.shape).astype(np.float32)
        except ValueError as error:
            raise UserError(
                f"condition.{name} does not hold the float16 values of shape {self.shape}."
            ) from error


def packed(values: np.ndarray) -> str:
    """Values as the base64 of little-endian float16, in row-major order."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f2").tobytes()).decode()


@dataclass(frozen=True)
class Strided:
    """How windows overlap where `algorithm` is strided (Graikos et al.).

    Attributes:
        share: windows begin every side / share; 4 is the papers' stride of 16 latent cells.
        average: of the estimates of x_0: `gaussian` (paper) or `uniform` (released code).
        coarser: average the embeddings over n x n patches first (their figure 10).
    """

    share: int = number(4, 1, 1024)
    average: str = choice("gaussian", ("gaussian", "uniform"))
    coarser: int = number(1, 1, 1024)

    def __post_init__(self) -> None:
        config.check_fields(self)


@dataclass(frozen=True)
class Source:
    """The image that `algorithm: superres` makes larger.

    Attributes:
        image: base64 of a PNG, JPEG or TIFF (`uploads.py`). Example: iVBORw0KGgo....
        octaves: n of 2^n.
        control: by the bundle's ControlNet (the baseline) in place of the constraint.
    """

    image: str = ""
    octaves: int = number(2, 1, LIMIT_SCALE)
    control: bool = False

    def __post_init__(self) -> None:
        config.check_fields(self)

    def png(self) -> bytes:
        """Return the bytes of the image file.

        Raises:
            UserError: not base64.
        """
        try:
            return base64.b64decode(self.image, validate=True)
        except ValueError as error:
            raise UserError("source.image is not the base64 of a PNG, JPEG or TIFF.") from error


@dataclass(frozen=True)
class Order:
    """One request for an image.

    Attributes:
        size: side in pixels, or (rows, columns); also written `4096x6144`. Example: 4096x6144.
        count: 0 for one large image; n for n separate patches at `scale`.
        scale: the scale whose pixels are wanted (0 is the base).
        seed: all randomness follows from it.
        batch: windows per batch; part of the order because it decides the last bits.
        chunk: steps per request, the grain of resumption.
        algorithm: of a large image: `joint` (ZoomLDM), `strided` (Graikos et al.) or `superres`,
            whose size is that of the source times 2^octaves.
        refine: remove the seams between the patches of a joint image, in six more steps.
        levels: scales from the guide's down to `scale`, such as 6,4,2,0; by default these two.
            Example: 6,4,2,0.
        recipe: the name the sampler's settings started from.
    """

    size: Any = field(default=0, metadata={"kind": SIZE})
    count: int = number(0, 0, 1 << 31)
    scale: int = number(0, 0, LIMIT_SCALE)
    seed: int = number(0, 0, (1 << 64) - 1)
    batch: int = number(16, 1, LIMIT_BATCH)
    chunk: int = number(10, 1, 1 << 20)
    algorithm: str = choice("joint", ("joint", "strided", "superres"))
    refine: bool = False
    levels: Any = field(default="", metadata={"kind": LEVELS})
    recipe: str = choice("paper", tuple(RECIPES))
    sampler: Sampler = field(default_factory=Sampler)
    strided: Strided = field(default_factory=Strided)
    source: Source = field(default_factory=Source)
    condition: Condition = field(default_factory=Condition)

    def __post_init__(self) -> None:
        config.check_fields(self)
        object.__setattr__(self, "size", _size(self.size))
        levels = config.whole_numbers("levels", self.levels, LEVELS, 0, LIMIT_SCALE)
        object.__setattr__(self, "levels", levels)

    def guide(self, patch: Patch) -> Scale:
        """The scale of the guide: the one at which a single patch covers the canvas."""
        return Scale(self.scale + guide_scale(self.size, patch.side_px).k)

    def levels_of(self, patch: Patch) -> tuple[int, ...]:
        """The scales that are sampled, coarse to fine; one alone where a patch covers all."""
        top = self.guide(patch).k
        return self.levels or ((top, self.scale) if top > self.scale else (self.scale,))

    def guided(self, patch: Patch) -> bool:
        """Whether the image's windows follow a guide that is sampled with them."""
        several = self.algorithm == "joint" and not self.count
        return several and len(self.levels_of(patch)) > 1

    def without_payload(self) -> Order:
        """The order without the bulk of its condition and source, for most requests."""
        condition = dataclasses.replace(self.condition, data="", shape=(), negative="")
        source = dataclasses.replace(self.source, image="")
        return dataclasses.replace(self, condition=condition, source=source)

    def as_json(self) -> dict[str, Any]:
        """The order as a JSON document; `parse` reads it back."""
        document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return document

    @property
    def digest(self) -> str:
        """A short name that equal orders share."""
        return storage.digest(json.dumps(self.as_json(), sort_keys=True).encode())


def parse(values: Mapping[str, Any]) -> Order:
    """Return an order from JSON or configuration values; the recipe sets what they leave open.

    Raises:
        UserError: an unknown recipe, key or kind, or a value of the wrong type.
    """
    recipe = values.get("recipe", "paper")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        known = ", ".join(RECIPES)
        raise UserError(f"there is no recipe '{format_value(recipe)}'; choose one of: {known}.")
    recipes = SUPERRES_RECIPES if values.get("algorithm") == "superres" else RECIPES
    settings = {"sampler": recipes[recipe], "condition": {"draw": recipe}}
    return config.build(Order, settings, dict(values))


def _interval(value: Any) -> tuple[float, ...]:
    try:
        low, high = read(tuple[float, float], value)
    except ValueError as error:
        raise UserError(
            f"sampler.interval {format_value(value)} is not two shares such as [0.2,0.8]."
        ) from error
    if not 0 <= low <= high <= 1:
        raise UserError(f"sampler.interval {format_value(value)} does not rise between 0 and 1.")
    return low, high


def _size(value: Any) -> tuple[int, int]:
    sides = config.whole_numbers("size", value, SIZE, 0, LIMIT_PX, "x")
    if len(sides) not in (1, 2) or (len(sides) == 2 and not all(sides) and any(sides)):
        raise UserError(f"size {format_value(value)} is not {SIZE}.")
    return sides[0], sides[-1]
