"""Randomness is an address, not a state.

Every random draw is a pure function of (seed, stream, address): a window's noise of
(scale, row, column, step), a training sample's of its global index. Who draws, in which
order and after which crash, changes nothing. Philox is counter-based: the address is the
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
    """The generator that stands at an address.

    Args:
        seed: 0 .. 2**64 - 1.
        stream: what the draws are for; streams never meet.
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


def normal(
    shape: Sequence[int], seed: int, stream: str, addresses: Iterable[Sequence[int]]
) -> Float[Tensor, "n ..."]:
    """Standard normal draws on the CPU, one of the given shape per address, stacked."""
    draws = [
        generator(seed, stream, *address).standard_normal(tuple(shape), dtype=np.float32)
        for address in addresses
    ]
    return torch.from_numpy(np.stack(draws))
