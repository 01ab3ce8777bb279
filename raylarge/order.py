"""An order: one request for an image, a frozen value that travels as JSON.

    {"size": 4096, "seed": 7, "condition": {"kind": "cdm"}, "recipe": "released"}

`recipe` names the sampler's settings as the paper states them or as its code was released;
single settings override it (`sampler.steps`). Two equal orders give the same pixels.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from raylarge import config, storage
from raylarge.config import Config, Form, read_numbers
from raylarge.errors import UserError
from raylarge.geometry import Patch, Scale, guide_scale

ALWAYS = (0.0, 1.0)
LIMIT_PX = 1 << 17
"""Longest side of an image in pixels."""
LIMIT_BATCH = 1024
MOST_STEPS = 999
"""Steps that a schedule of 1,000 timesteps has room for."""
LIMIT_GUIDANCE = 100
"""Far beyond use; larger factors leave the range of half precision, and then of float32."""
LIMIT_SCALE = 30


def _read_size(value: Any) -> tuple[int, int]:
    """Return rows and columns of a side, two sides or a word such as 4096x6144."""
    sides = read_numbers(value, "x")
    if len(sides) not in (1, 2) or (len(sides) == 2 and not all(sides) and any(sides)):
        raise ValueError("neither one side nor two")
    return sides[0], sides[-1]


def _rising(shares: tuple[float, float]) -> tuple[float, float]:
    low, high = shares
    if not 0 <= low <= high <= 1:
        raise ValueError("two shares that rise, from 0 to 1")
    return shares


_Side = Annotated[int, Field(ge=0, le=LIMIT_PX)]
_ScaleIndex = Annotated[int, Field(ge=0, le=LIMIT_SCALE)]
_Length = Annotated[int, Field(ge=1, le=1 << 31)]
Size = Annotated[
    tuple[_Side, _Side], Form("a number of pixels such as 4096 or 4096x6144", _read_size)
]
Levels = Annotated[tuple[_ScaleIndex, ...], Form("a list of scales such as 6,4,2,0", read_numbers)]
Shape = Annotated[tuple[_Length, ...], Form("a list of sides such as [2,2,384]", read_numbers)]
Recipe = Literal["paper", "released"]
Solver = Literal["ddim", "plms", "dpm++", "unipc"]


class Sampler(Config):
    """Settings of the sampler and of the correction of Algorithm S2."""

    steps: int = Field(50, ge=1, le=MOST_STEPS)
    """Steps S."""
    solver: Solver = "ddim"
    """`ddim`; for separate patches also `plms`, `dpm++` or `unipc` (eta 0)."""
    eta: float = Field(0.0, ge=0, le=1)
    """0 is deterministic DDIM, 1 the ancestral variance."""
    guidance: float = Field(2.0, ge=0, le=LIMIT_GUIDANCE)
    """w of u + w (c - u)."""
    corrections: int = Field(1, ge=0, le=1000)
    """K in every step; 0 samples without the constraint."""
    correction: Literal["encoder", "backprop"] = "encoder"
    """`encoder` (Algorithm S2) or `backprop` through the decoder (S1), as comparison."""
    constraint: Literal["window", "mosaic"] = "window"
    """Where A acts: inside each `window` (released code), or on the arranged `mosaic`, across the
    windows' borders (the paper's text)."""
    correction_lr: float = Field(0.5, ge=0, le=100)
    """The correction's learning rate, lambda."""
    normalize: bool = False
    """Divide e_img, e and g by their largest magnitude per window (released code)."""
    clamp: bool = False
    """Clamp the guide's frames to [-1, 1] before they constrain (released code)."""
    derivative: Literal["jvp", "difference"] = "jvp"
    """`jvp` (forward mode) or `difference` (the papers' finite difference, for float32 only: in
    half precision it cancels)."""
    fd_epsilon: float = Field(0.005, gt=0, le=1)
    """The finite difference's delta and zeta."""
    interval: Annotated[tuple[float, float], AfterValidator(_rising)] = ALWAYS
    """Shares of the schedule between which timesteps are guided; all by default. Not to guide the
    others saves half of their U-Net and changes the image."""
    correct_every: int = Field(1, ge=1, le=MOST_STEPS)
    """Correct in every n-th step alone; saves, and changes the image."""
    small_autoencoder: bool = False
    """Correct with the bundle's small autoencoder; saves, and changes the image."""

    @property
    def mosaic(self) -> bool:
        """Whether the constraint acts across the windows' borders."""
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

FINE = {"null": "null", "independent": "cdm", "inversion": "inverted", "prior": "prior"}
"""What may condition windows under a guide that the CDM drew, and the kind that it is."""


class Condition(Config):
    """What the image should show."""

    kind: Literal["null", "cdm", "embeddings", "inverted", "prior"] = "null"
    """`null` (nothing), `cdm` (tokens drawn by the CDM), `embeddings` (a grid of raw base
    embeddings, or one such grid per patch), `inverted` (embeddings inferred from the image that is
    super-resolved), `prior` (a grid that the grid prior draws for a vector: a text's embedding, a
    label's)."""
    fine: Literal["null", "independent", "inversion", "prior"] = "null"
    """Under `cdm`, what conditions the fine windows: `null`, `independent` draws of the CDM, the
    `inversion` of the finished guide, or a draw of the `prior`."""
    draw: Recipe = "paper"
    """How the CDM draws: `paper` (50 steps of DDIM) or `released` (200 respaced steps)."""
    data: str = Field("", examples=["AAAAPA=="])
    """Base64 of little-endian float16 values in row-major order."""
    shape: Shape = Field((), examples=[(1, 1, 2)])
    """(rows, columns, channels), with the number of patches in front for patches; of a vector its
    width alone. Without one a fine `prior` draws unconditionally."""
    negative: str = Field("", examples=["AAAAPA=="])
    """The vector that the prior is led away from, packed as `data`."""
    prior_guidance: float = Field(1.0, ge=0, le=LIMIT_GUIDANCE)
    """w of the prior's u + w (c - u)."""
    prior_steps: int = Field(50, ge=1, le=MOST_STEPS)
    """Steps of the prior's DDIM."""
    iterations: int = Field(200, ge=1, le=100_000)
    """Iterations of an inversion, under kind `inverted` or fine `inversion`."""

    @classmethod
    def of(cls, grid: np.ndarray) -> Condition:
        """Return a condition on raw embeddings [rows, columns, C], or of patches [n, r, c, C]."""
        return cls(kind="embeddings", data=packed(grid), shape=grid.shape)

    @classmethod
    def of_vector(cls, vector: np.ndarray, negative: np.ndarray | None = None) -> Condition:
        """Return a condition on a vector [V] for the grid prior, and perhaps against another."""
        against = "" if negative is None else packed(negative)
        return cls(kind="prior", data=packed(vector), shape=vector.shape, negative=against)

    @property
    def fine_kind(self) -> str:
        """How windows under a guide are conditioned, as a `kind`."""
        return FINE[self.fine] if self.kind == "cdm" else self.kind

    def grid(self) -> np.ndarray:
        """Return the embeddings as float32.

        Raises:
            UserError: the data do not fill the shape.
        """
        return self._unpacked("data")

    def against(self) -> np.ndarray | None:
        """Return the negative vector as float32, if there is one.

        Raises:
            UserError: it does not have the vector's width.
        """
        return self._unpacked("negative") if self.negative else None

    def _unpacked(self, name: str) -> np.ndarray:
        try:
            flat = np.frombuffer(base64.b64decode(getattr(self, name), validate=True), "<f2")
            return flat.reshape(self.shape).astype(np.float32)
        except ValueError as error:
            raise UserError(
                f"condition.{name} does not hold the float16 values of shape {self.shape}."
            ) from error


def packed(values: np.ndarray) -> str:
    """Return the base64 of little-endian float16 values, in row-major order."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f2").tobytes()).decode()


class Strided(Config):
    """How windows overlap where `algorithm` is strided (Graikos et al.)."""

    share: int = Field(4, ge=1, le=1024)
    """Windows begin every side / share; 4 is the papers' stride of 16 latent cells."""
    average: Literal["gaussian", "uniform"] = "gaussian"
    """Weights of the estimates of x_0: `gaussian` (paper) or `uniform` (released code)."""
    coarser: int = Field(1, ge=1, le=1024)
    """Average the embeddings over n x n patches first (their figure 10)."""


class Source(Config):
    """The image that `algorithm: superres` makes larger."""

    image: str = Field("", examples=["iVBORw0KGgo..."])
    """Base64 of a PNG, JPEG or TIFF (`uploads.py`)."""
    octaves: int = Field(2, ge=1, le=LIMIT_SCALE)
    """n of 2^n."""
    control: bool = False
    """By the bundle's ControlNet (the baseline) in place of the constraint."""

    def png(self) -> bytes:
        """Return the bytes of the image file.

        Raises:
            UserError: not base64.
        """
        try:
            return base64.b64decode(self.image, validate=True)
        except ValueError as error:
            raise UserError("source.image is not the base64 of a PNG, JPEG or TIFF.") from error


class Order(Config):
    """One request for an image."""

    size: Size = Field((0, 0), examples=["4096x6144"])
    """Side in pixels, or (rows, columns); also written `4096x6144`."""
    count: int = Field(0, ge=0, le=1 << 31)
    """0 for one large image; n for n separate patches at `scale`."""
    scale: int = Field(0, ge=0, le=LIMIT_SCALE)
    """The scale whose pixels the image shows (0 is the base)."""
    seed: int = Field(0, ge=0, le=(1 << 64) - 1)
    """All randomness follows from it."""
    batch: int = Field(16, ge=1, le=LIMIT_BATCH)
    """Windows per batch; part of the order because it decides the last bits."""
    chunk: int = Field(10, ge=1, le=1 << 20)
    """Steps per request; an interrupted order loses at most these."""
    algorithm: Literal["joint", "strided", "superres"] = "joint"
    """Of a large image: `joint` (ZoomLDM), `strided` (Graikos et al.) or `superres`, whose size is
    that of the source times 2^octaves."""
    refine: bool = False
    """Remove the seams between the patches of a joint image, in six more steps."""
    levels: Levels = Field((), examples=["6,4,2,0"])
    """Scales from the guide's down to `scale`, such as 6,4,2,0; by default these two."""
    recipe: Recipe = "paper"
    """The name of the settings that fill what `sampler` and `condition.draw` leave open."""
    sampler: Sampler = Sampler()
    strided: Strided = Strided()
    source: Source = Source()
    condition: Condition = Condition()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Return the values with those of the recipe that they leave open."""
        recipe = values.get("recipe", "paper") if isinstance(values, Mapping) else None
        if not isinstance(recipe, str) or recipe not in RECIPES:
            return values
        recipes = SUPERRES_RECIPES if values.get("algorithm") == "superres" else RECIPES
        settings = {"sampler": recipes[recipe], "condition": {"draw": recipe}}
        return config.merged(settings, values)

    def guide(self, patch: Patch) -> Scale:
        """Return the scale of the guide: the one at which a single patch covers the canvas."""
        return Scale(self.scale + guide_scale(self.size, patch.side_px).k)

    def levels_of(self, patch: Patch) -> tuple[int, ...]:
        """Return the sampled scales, coarse to fine; a single one where a patch covers all."""
        top = self.guide(patch).k
        return self.levels or ((top, self.scale) if top > self.scale else (self.scale,))

    def guided(self, patch: Patch) -> bool:
        """Whether the image's windows follow a guide that is sampled with them."""
        several = self.algorithm == "joint" and not self.count
        return several and len(self.levels_of(patch)) > 1

    def without_payload(self) -> Order:
        """Return the order without the bulk of its condition and source, for most requests."""
        condition = self.condition.replace(data="", shape=(), negative="")
        return self.replace(condition=condition, source=self.source.replace(image=""))

    def as_json(self) -> dict[str, Any]:
        """Return the order as a JSON document; `parse` reads it back."""
        return self.plain()

    @property
    def digest(self) -> str:
        """A short name that equal orders share."""
        return storage.digest(json.dumps(self.as_json(), sort_keys=True).encode())


def parse(values: Mapping[str, Any]) -> Order:
    """Return an order of JSON or configuration values; the recipe fills what they leave open.

    Raises:
        UserError: an unknown key, or a value that does not fit.
    """
    return config.build(Order, values)
