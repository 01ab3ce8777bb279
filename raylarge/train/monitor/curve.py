"""What a run leaves for people: its loss curve as a picture, and its report.

    rows of loss.csv -> curve.png                  facts, rows -> report.json

Rows have step, loss, lr, samples_per_s, seconds, skipped and, where a checkpoint was held
against held-out samples, val.
"""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from raylarge import images, storage

Pixels = UInt8[np.ndarray, "_ _ 3"]
Rows = Sequence[Mapping[str, Any]]
"""Of loss.csv: text or numbers; what is empty or missing is not known."""

SIZE_PX = (900, 520)
_RAW, _SMOOTH, _HELD_OUT, _SKIPPED = "#b9cfe4", "#1f5f9f", "#d55e00", "#cc0000"
PACKAGES = ("raylarge", "torch", "deepspeed", "ray", "diffusers")
FEW = 30  # rows, below which each bears a mark
SMOOTH = 40
"""The running mean is over a part in so many of the curve on either side."""


def curve(rows: Rows, path: str) -> Pixels:
    """Draw a loss curve and write it as a PNG.

    Args:
        rows: of loss.csv.
        path: local or a URL.

    Returns:
        The picture, for a tracker.
    """
    pixels = drawn(rows)
    images.write_png(path, pixels, synthetic=False)
    return pixels


def rows_of(text: str) -> list[dict[str, str]]:
    """The rows of a loss.csv."""
    return list(csv.DictReader(io.StringIO(text)))


def drawn(rows: Rows) -> Pixels:
    """A loss curve: each row's loss and their running mean, held-out losses, the lr below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE_PX[0] / 100, SIZE_PX[1] / 100), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if rows:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        _losses(top, rows)
        _rates(bottom, rows)
        for axes in (top, bottom):
            axes.grid(True, which="major", color="#e4e4e4", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
    else:
        figure.text(0.5, 0.5, "no steps yet", ha="center")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def report(root: str, facts: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """Write `report.json` into a run's folder.

    Args:
        root: the run's folder, local or a URL.
        facts: what the loop says at its end, with a `Meter`'s figures of the whole run.
        rows: of loss.csv.

    Returns:
        What was written: the same names for every run, null where something is not known.
    """
    names = ("step", "samples", "seconds", "loss", "first_loss", "skipped", "resumed_from")
    speed = ("samples_per_s", "tflops", "mfu", "waiting", "memory_gb")
    document = {
        **{name: facts.get(name) for name in (*names, *speed)},
        "best": best(rows),
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "facts": dict(facts),
    }
    document = _plain(document)
    storage.write_json(storage.join(root, "report.json"), document)
    return document


def best(rows: Rows) -> dict[str, Any] | None:
    """The step with the lowest held-out loss, and that loss, if there is any."""
    steps, held_out = _column(rows, "step"), _column(rows, "val")
    if not np.isfinite(held_out).any():
        return None
    i = int(np.nanargmin(np.where(np.isfinite(held_out), held_out, np.nan)))
    return {"step": int(steps[i]), "val": float(held_out[i])}


def _losses(axes: Any, rows: Rows) -> None:
    steps, loss, held_out = (_column(rows, name) for name in ("step", "loss", "val"))
    smooth = _smoothed(loss)
    axes.plot(steps, loss, color=_RAW, linewidth=0.8, label="loss")
    mark = "." if len(rows) < FEW else ""
    axes.plot(steps, smooth, mark + "-", color=_SMOOTH, linewidth=1.6, label="running mean")
    if found := best(rows):
        axes.plot(steps, held_out, "o", color=_HELD_OUT, markersize=4, label="held out")
        axes.plot(found["step"], found["val"], "o", color=_HELD_OUT, markersize=9, fillstyle="none")
        axes.annotate(
            f"{found['val']:.4g}",
            (found["step"], found["val"]),
            xytext=(0, -20),
            textcoords="offset points",
            ha="center",
            color=_HELD_OUT,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    skipped = np.nan_to_num(_column(rows, "skipped"))
    at = steps[np.diff(skipped, prepend=0.0) > 0]
    if len(at):
        places = axes.get_xaxis_transform()
        axes.plot(
            at, np.full(len(at), 0.01), "|", color=_SKIPPED, transform=places, label="skipped"
        )
    _scale(axes, np.concatenate([smooth, held_out]))
    axes.set_ylabel("loss")
    axes.legend(loc="upper right", frameon=False, ncols=4)


def _rates(axes: Any, rows: Rows) -> None:
    mark = "." if len(rows) < FEW else ""
    axes.plot(_column(rows, "step"), _column(rows, "lr"), mark + "-", color=_SMOOTH, lw=1.2)
    axes.set_ylabel("lr")
    axes.set_xlabel("steps")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.ticklabel_format(axis="y", scilimits=(-2, 2))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _scale(axes: Any, values: Float[np.ndarray, " n"]) -> None:
    """A logarithmic axis where losses span a factor of five; its ticks bear plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = values[np.isfinite(values)]
    if len(values) == 0 or values.min() <= 0 or values.max() < 5 * values.min():
        return
    axes.set_yscale("log")
    subs = (1.0, 2.0, 5.0) if values.max() < 200 * values.min() else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Running mean without a lag: of as many values on either side, fewer at the steep start.

    What is not finite is left out.
    """
    n, good = len(values), np.isfinite(values)
    place = np.arange(n)
    half = np.minimum(place // 4, n // SMOOTH)
    first, last = place - half, np.minimum(place + half + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    total, count = sums[last] - sums[first], counts[last] - counts[first]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _column(rows: Rows, name: str) -> Float[np.ndarray, " n"]:
    found = (row.get(name) for row in rows)
    return np.array([math.nan if v in (None, "") else float(v) for v in found], dtype=float)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)  # asked without importing it
    except metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """As JSON holds it: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
