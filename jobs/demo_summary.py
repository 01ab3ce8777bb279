"""The demo's closing table, and the captions of its sheets."""

from __future__ import annotations

from typing import Any

from raylarge import report
from raylarge.evaluate.conditioning import loss_rows, meaning


def captions(scale: int, base_mpp: float | None) -> str:
    """Return a scale as a caption, with micrometres per pixel where they are known."""
    mpp = f", {base_mpp * 2**scale:.3g} um/px" if base_mpp else ""
    return f"scale {scale}{mpp}"


def summary(checks: dict[str, Any]) -> str:
    """Return the measurements as text, each kind with one line of meaning."""
    corrected, without = (checks["images"][name] for name in ("reference", "uncorrected"))
    lines = corrected.get("window_lines", "too few windows")
    rows = [
        ["cross-scale error, corrected", corrected["cross_scale_error"]],
        ["cross-scale error, uncorrected", without["cross_scale_error"]],
        ["seam ratio (1: edges at borders as elsewhere)", corrected["seam_ratio"]],
        ["window lines (about 1: none, above 3: a grid)", lines],
    ]
    header = ["held-out loss at scale", "true condition", "shuffled", "no condition"]
    losses = checks["loss"]
    return "\n".join(
        [
            report.table(["measured", ""], rows),
            "cross-scale error: how far the large image, made small, is from its guide (0: equal)",
            "",
            report.table(header, loss_rows(losses)),
            meaning(losses),
        ]
    )
