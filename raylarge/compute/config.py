"""Compute settings of workers: threads, precision, compilation and GPUs.

Like the hardware, these settings decide the last bits of an image; the number of workers does
not. Replies of one precision are not resumed in another.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field

from raylarge.config import Config

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _check_gpus(gpus: float) -> float:
    if gpus < 0 and gpus != -1:
        raise ValueError("-1 or a number of GPUs from 0")
    return gpus


class ComputeConfig(Config):
    """Compute settings of every worker."""

    threads: int = Field(1, ge=1)
    """CPU threads of each worker, and cores of the cluster; with `dtype` and `compile` they decide
    the last bits of the image, which more workers do not."""
    dtype: Dtype = "float32"
    """Of the networks."""
    compile: bool = False
    """Compile the networks where no derivative is taken: a minute or more at first, then faster."""
    gpus: Annotated[float, AfterValidator(_check_gpus)] = -1.0
    """GPUs of each worker; less than 1 shares one, 0 is the CPU, -1 is one if there is any."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision as torch names it."""
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """Names precision and compilation: nothing, for the usual ones."""
        usual = self.dtype == "float32" and not self.compile
        return "" if usual else f"{self.dtype}{'-compiled' if self.compile else ''}"
