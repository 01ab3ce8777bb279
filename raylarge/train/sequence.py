"""The order of training samples: maps a sample index to a row, in constant time.

    sample -> scale:   every DEAL samples hold each scale as often as its weight says,
                       in an order drawn for each deal
           -> row:     the n-th sample of a scale is the n-th row of its stream

In every epoch of a stream the scale's row groups come in a newly drawn order; `super_block` of
them together are shuffled row by row. So a reader needs few row groups at a time, and resuming
needs only the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from raylarge.diffusion.noise import generator, split_64
from raylarge.errors import UserError

DEAL = 4096


class Block(NamedTuple):
    """A super-block of a scale's stream."""

    scale: int
    epoch: int
    number: int


class Place(NamedTuple):
    """Where a sample's row is: the super-block it belongs to, its row group, the row in that."""

    block: Block
    group: int  # among those of the scale
    row: int


class Sequencer:
    """Maps global sample indices to rows of some scales."""

    def __init__(
        self,
        groups: dict[int, Sequence[int]],
        weights: Sequence[float],
        seed: int,
        super_block: int,
    ) -> None:
        """Take the rows of each scale's row groups.

        Args:
            groups: by scale, how many rows each of its row groups holds.
            weights: one per scale, the base first; empty: all alike.
            seed: of all draws.
            super_block: row groups that are shuffled together.

        Raises:
            UserError: weights that do not fit the scales.
        """
        self._seed, self._width = seed, super_block
        self._rows = {k: np.asarray(sizes, np.int64) for k, sizes in sorted(groups.items())}
        self._total = {k: int(sizes.sum()) for k, sizes in self._rows.items()}
        self._quota = _quotas(list(self._rows), weights)
        self._deals = lru_cache(4)(self._deal)
        self._orders = lru_cache(4 * len(groups))(self._order)
        self._blocks = lru_cache(4 * len(groups))(self._block)

    def place(self, sample: int) -> Place:
        """Return the row of a global sample index."""
        deal, at = divmod(sample, DEAL)
        scales, ranks = self._deals(deal)
        k = int(scales[at])
        epoch, offset = divmod(deal * self._quota[k] + int(ranks[at]), self._total[k])
        _, edges = self._orders(k, epoch)
        number = int(np.searchsorted(edges, offset, side="right")) - 1
        block = Block(k, epoch, number)
        group, row = self._blocks(block)[offset - edges[number]]
        return Place(block, int(group), int(row))

    def groups(self, block: Block) -> list[int]:
        """Return the row groups of a super-block, as indices among those of its scale."""
        order, _ = self._orders(block.scale, block.epoch)
        start = block.number * self._width
        groups: list[int] = order[start : start + self._width].tolist()
        return groups

    def after(self, block: Block) -> Block:
        """Return the next super-block of the stream."""
        _, edges = self._orders(block.scale, block.epoch)
        if block.number + 2 < len(edges):
            return block._replace(number=block.number + 1)
        return Block(block.scale, block.epoch + 1, 0)

    def _deal(self, deal: int) -> tuple[Int[np.ndarray, " deal"], Int[np.ndarray, " deal"]]:
        """Return each sample's scale in a deal, and how many of that scale precede it there."""
        scales = np.repeat(list(self._quota), list(self._quota.values()))
        scales = self._draw("deal", deal).permutation(scales)
        ranks = np.empty(DEAL, np.int64)
        for k, count in self._quota.items():
            ranks[scales == k] = np.arange(count)
        return scales, ranks

    def _order(
        self, k: int, epoch: int
    ) -> tuple[Int[np.ndarray, "groups"], Int[np.ndarray, " edges"]]:
        """Return a scale's row groups in the order of an epoch, and where super-blocks begin."""
        order = self._draw("groups", k, epoch).permutation(len(self._rows[k]))
        ends = np.cumsum(self._rows[k][order])
        last = np.arange(self._width, len(order) + self._width, self._width).clip(max=len(order))
        return order, np.concatenate([[0], ends[last - 1]])

    def _block(self, block: Block) -> Int[np.ndarray, "rows 2"]:
        """Return (row group, row) of a super-block's rows, shuffled."""
        groups = self.groups(block)
        sizes = self._rows[block.scale][groups]
        rows = np.concatenate([np.arange(size) for size in sizes])
        pairs = np.stack([np.repeat(groups, sizes), rows], axis=1)
        return self._draw("rows", *block).permutation(pairs)

    def _draw(self, what: str, *address: int) -> np.random.Generator:
        halves = [half for part in address for half in split_64(part)]
        return generator(self._seed, f"ingest {what}", *halves)


def _quotas(scales: Sequence[int], weights: Sequence[float]) -> dict[int, int]:
    """Return each scale's samples per deal: largest remainders, at least 1 where the weight is > 0.

    Raises:
        UserError: not one weight, 0 or more, for each scale.
    """
    share = np.array(weights or [1.0] * len(scales), float)
    if len(share) != len(scales) or (share < 0).any() or not 0 < share.sum() < np.inf:
        raise UserError(
            f"scale_weights={list(weights)} does not fit; give one weight, 0 or more, for each "
            f"of the scales {list(scales)} that have training rows."
        )
    exact = DEAL * share / share.sum()
    quota = np.where(share > 0, np.maximum(np.floor(exact), 1), 0).astype(int)
    for at in np.argsort(quota - exact, kind="stable")[: max(0, DEAL - quota.sum())]:
        quota[at] += 1
    quota[np.argmax(quota)] -= quota.sum() - DEAL
    return {k: int(n) for k, n in zip(scales, quota, strict=True)}
