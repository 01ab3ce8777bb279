"""How workers compute: their threads, precision, compilation and GPUs.

Like the hardware, these decide the last bits of what is made; how many workers there are does
not. A ledger of one precision is not taken up by another; hardware and threads are the user's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raylarge.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ComputeConfig:
    """What every worker has.

    Attributes:
        threads: CPU threads, and cores of the cluster.
        dtype: of the networks: float32, bfloat16 or float16.
        compile: `torch.compile` the denoiser and the decoder: a minute or more at first, then
            faster; derivatives stay as they are.
        gpus: GPUs of the cluster; less than 1 shares one, 0 is the CPU, -1 is one if there is any.

    Raises:
        UserError: a value that means nothing.
    """

    threads: int = 1
    dtype: str = "float32"
    compile: bool = False
    gpus: float = -1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UserError(f"threads {self.threads} starts at 1.")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype '{self.dtype}' is not {', '.join(DTYPES)}.")
        if self.gpus < 0 and self.gpus != -1:
            raise UserError(f"gpus {self.gpus} is neither -1 nor a share of a GPU from 0.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision as torch names it."""
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """Names precision and compilation: nothing, for the usual ones."""
        usual = self.dtype == "float32" and not self.compile
        return "" if usual else f"{self.dtype}{'-compiled' if self.compile else ''}"
