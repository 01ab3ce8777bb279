"""The configuration of a sampling job: bundle, output folder, order and conditions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from raylarge import config as configuration
from raylarge.compute.config import ComputeConfig
from raylarge.execution.reference import Place
from raylarge.order import Order


class SampleConfig(ComputeConfig):
    """The keys of `jobs/sample.py`."""

    bundle: str = Field(examples=["bundle"])
    """The folder of the models."""
    out: str = Field(examples=["image"])
    """The folder to write into."""
    order: Order = Order()
    """The order, such as `order.size=512 order.recipe=released`."""
    workers: int = Field(0, ge=0)
    """Ray actors; 0 samples in this process, without Ray."""
    reference: str = Field("", examples=["data"])
    """`DATA` or `DATA:slide_id`, whose embeddings condition the image."""
    at: Place = Field(None, examples=["3,5"])
    """`row,column` of the region's first base tile, of `patch` pixels at scale 0; left out: the
    first place that has them all. The job prints the region that it takes, and its right
    neighbour."""
    image: str = Field("", examples=["small.png"])
    """A PNG to make larger by `order.source.octaves` (`order.algorithm` superres)."""
    text: str = Field("", examples=["tumour nests"])
    """What the image should show, for the bundle's grid prior."""
    negative: str = Field("", examples=["blur"])
    """What it should not show."""
    text_encoder: str = "minilm"
    """Card of the encoder that the prior was trained with (`models/text.py`)."""
    text_weights: str = Field("", examples=["minilm/"])
    """Its folder, where it does not come with a package or from the hub."""
    overwrite: bool = False
    """Replace what `out` holds of another order, or files that are not raylarge's."""
    dry_run: bool = False
    """Only say what the order costs."""
    tflops: float = Field(200.0, gt=0)
    """The rate, in 10^12 FLOP/s per GPU, that the price is told at; the default is a fifth of an
    H100's bf16 peak."""

    @model_validator(mode="before")
    @classmethod
    def _enlarge(cls, values: Any) -> Any:
        """Return the values; an `image` is made larger by `order.algorithm=superres`."""
        if not isinstance(values, Mapping) or not values.get("image"):
            return values
        return configuration.merged({"order": {"algorithm": "superres"}}, values)

    @property
    def compute(self) -> ComputeConfig:
        """The settings of each worker."""
        return ComputeConfig(**{name: getattr(self, name) for name in ComputeConfig.model_fields})
