"""Random numbers by address instead of by state.

Every draw is a pure function of (seed, stream, address): the address of a window's noise is
(scale, row, column, step), that of a training sample its global index. Which process draws, in
which order and after which crash does not matter. Philox is counter-based: the address is the
counter (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def generator(seed: int, stream: str, *address: int) -> np.random.Generator:
    """Return the generator of an address.

    Args:
        seed: 0 .. 2**64 - 1.
        stream: purpose of the draws; streams are independent.
        address: up to six integers, each 0 .. 2**32 - 1.

    Raises:
        ValueError: an address that is too long or out of range.
    """
    if len(address) > 6 or any(not 0 <= part < 1 << 32 for part in address):
        raise ValueError(f"a noise address is up to six integers below 2**32, not {address}")
    parts = [*address, *[0] * (6 - len(address))]
    counter = [0] + [parts[i] << 32 | parts[i + 1] for i in (0, 2, 4)]
    key = [seed, zlib.crc32(stream.encode())]
    return np.random.Generator(
        np.random.Philox(
            counter=np.array(counter, dtype=np.uint64), key=np.array(key, dtype=np.uint64)
        )
    )


def split_64(number: int) -> tuple[int, int]:
    """Return the upper and the lower 32 bits of a number below 2**64, as parts of an address."""
    return number >> 32, number & 0xFFFFFFFF


def normal(
    shape: Sequence[int], seed: int, stream: str, addresses: Iterable[Sequence[int]]
) -> Float[Tensor, "n ..."]:
    """Return standard normal noise on the CPU, one tensor of the shape per address, stacked."""
    draws = [
        generator(seed, stream, *address).standard_normal(tuple(shape), dtype=np.float32)
        for address in addresses
    ]
    return torch.from_numpy(np.stack(draws))
