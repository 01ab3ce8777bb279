"""The demo's closing table, and the captions of its sheets."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8

from raylarge import images, report
from raylarge.evaluate.conditioning import loss_rows, summarize_losses
from raylarge.metrics.consistency import cross_scale_error
from raylarge.metrics.lines import MIN_WINDOWS, window_lines
from raylarge.metrics.seams import seam_ratio


def captions(scale: int, base_mpp: float | None) -> str:
    """Return a scale as a caption, with micrometres per pixel where they are known."""
    mpp = f", {base_mpp * 2**scale:.3g} um/px" if base_mpp else ""
    return f"scale {scale}{mpp}"


def measures(
    image: UInt8[np.ndarray, "H W 3"], guide: UInt8[np.ndarray, "P P 3"], side: int
) -> dict[str, float]:
    """Return the figures of a large image; lines of windows only where there are enough of them.

    Args:
        image: all of it.
        guide: the patch that it followed.
        side: of a window in pixels.
    """
    whole, small = (images.to_float(pixels) for pixels in (image, guide))
    figures = {
        "cross_scale_error": round(cross_scale_error(whole, small), 4),
        "seam_ratio": round(seam_ratio(whole, side), 4),
    }
    if max(image.shape[:2]) >= MIN_WINDOWS * side:
        figures["window_lines"] = round(window_lines(whole, side), 2)
    return figures


def summary(checks: dict[str, Any]) -> str:
    """Return the measurements as text, each kind with one line of meaning."""
    corrected, without = (checks["images"][name] for name in ("reference", "uncorrected"))
    rows = [
        ["cross-scale error, corrected", corrected["cross_scale_error"]],
        ["cross-scale error, uncorrected", without["cross_scale_error"]],
        ["seam ratio (1: edges at borders as elsewhere)", corrected["seam_ratio"]],
    ]
    if "window_lines" in corrected:
        lines = corrected["window_lines"]
        rows.append(["window lines (about 1: none, above 3: a grid)", lines])
    header = ["held-out loss at scale", "true condition", "shuffled", "no condition"]
    losses = checks["loss"]
    return "\n".join(
        [
            report.table(["measured", ""], rows),
            "cross-scale error: how far the large image, made small, is from its guide (0: equal)",
            "",
            report.table(header, loss_rows(losses)),
            summarize_losses(losses),
        ]
    )
