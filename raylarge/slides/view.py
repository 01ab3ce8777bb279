"""A slide seen shifted, turned and mirrored: more training examples from little tissue.

    view 0 is the slide as it is; view n starts at a random pixel of the first base tile and shows
    the n-th of the eight symmetries of a square

Every table row of a view is computed from the view's own pixels, embeddings included, so a
view needs no special case after `Slide.read`. Coordinates of a view are base pixels, rows first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raylarge.diffusion.noise import generator, split_64

_SYMMETRIES = 8


@dataclass(frozen=True)
class View:
    """A shift followed by one of the eight symmetries of a square.

    Attributes:
        shift_px: rows and columns that are cut off the slide's upper and left edge.
        turns: quarter turns, counter-clockwise.
        mirror: reverse the columns after turning.
    """

    shift_px: tuple[int, int] = (0, 0)
    turns: int = 0
    mirror: bool = False

    @classmethod
    def of(cls, number: int, slide_id: str, patch_px: int, unit_px: int, seed: int) -> View:
        """Return the view of a number; a pure function of its arguments.

        Args:
            number: 0 is the slide as it is.
            slide_id: hexadecimal pseudonym of the view.
            patch_px: the shift is smaller than this.
            unit_px: the shift is a multiple of this.
            seed: of the shifts.
        """
        if number == 0:
            return cls()
        shift = generator(seed, "tile views", *split_64(int(slide_id, 16)), number).integers(
            patch_px // unit_px, size=2
        )
        turns, mirror = divmod(number % _SYMMETRIES, 2)
        return cls((int(shift[0]) * unit_px, int(shift[1]) * unit_px), turns, bool(mirror))

    @property
    def is_identity(self) -> bool:
        """Return whether the view is the slide itself."""
        return self == View()

    def size(self, whole_px: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of the view of a slide of `whole_px` (rows, columns)."""
        rows, columns = (w - s for w, s in zip(whole_px, self.shift_px, strict=True))
        return (columns, rows) if self.turns % 2 else (rows, columns)

    def source(
        self, box_px: tuple[int, int, int, int], whole_px: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        """Return the slide's (top, left, rows, columns) that a box of the view shows."""
        top, left, rows, columns = box_px
        height, width = self.size(whole_px)
        if self.mirror:
            left = width - left - columns
        for _ in range(self.turns):  # undo one counter-clockwise turn after the other
            height, width = width, height
            top, left, rows, columns = left, width - top - rows, columns, rows
        return top + self.shift_px[0], left + self.shift_px[1], rows, columns

    def turned(self, pixels: np.ndarray) -> np.ndarray:
        """Return what the view shows of the slide's [rows, columns, ...], shift left aside."""
        out = np.rot90(pixels, self.turns)
        return np.ascontiguousarray(out[:, ::-1] if self.mirror else out)

    def of_whole(self, cells: np.ndarray, downscale: int, whole_px: tuple[int, int]) -> np.ndarray:
        """Return the view of a thumbnail or mask of the whole slide, to within one cell.

        Args:
            cells: [ceil(rows / downscale), ceil(columns / downscale), ...] of the whole slide.
            downscale: base pixels per cell.
            whole_px: (rows, columns) of the slide.
        """
        top, left = (shift // downscale for shift in self.shift_px)
        bottom, right = (
            start - (shift - whole) // downscale
            for start, shift, whole in zip((top, left), self.shift_px, whole_px, strict=True)
        )
        return self.turned(cells[top:bottom, left:right])
