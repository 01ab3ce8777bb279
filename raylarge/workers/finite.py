"""Refuse replies with NaN or infinite values, before they become pixels.

Weights, conditions and settings are checked where they are read; what overflows on the way
(half precision, extreme settings) is caught here, at each request, and named with its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from raylarge.errors import UserError
from raylarge.models.weights import is_finite
from raylarge.sampling import tasks
from raylarge.sampling.tasks import Parts, Task

NAMED_WINDOWS = 4
"""Windows that a message names; of more it names the first ones."""


def check_reply(task: Task, reply: Any) -> None:
    """Refuse a reply that holds NaN or infinity; arrays of pixels pass.

    Raises:
        UserError: what is not finite, of which windows or rows, and what may cure it.
    """
    tensors = (reply.whole, *reply.parts) if isinstance(reply, Parts) else (reply,)
    if all(is_finite(tensor) for tensor in tensors if isinstance(tensor, Tensor)):
        return
    sampler = task.order.sampler
    raise UserError(
        f"{described(task)} hold NaN or infinite values, so no image is written; lower "
        f"order.sampler.guidance={sampler.guidance:g} or "
        f"order.sampler.correction_lr={sampler.correction_lr:g}, compute in "
        "dtype=float32, or look whether the bundle's training diverged."
    )


def described(task: Task) -> str:
    """Return what a task computes and where, as the plural subject of a sentence."""
    describe = _DESCRIPTIONS.get(type(task))
    return describe(task) if describe else f"the results of {type(task).__name__}"


def _cells(windows: tuple[tuple[int, int], ...]) -> str:
    some = ", ".join(f"({row}, {column})" for row, column in windows[:NAMED_WINDOWS])
    return f"{some}{', …' if len(windows) > NAMED_WINDOWS else ''}"


_DESCRIPTIONS: dict[type[Task], Callable[[Any], str]] = {
    tasks.EncodeContext: lambda t: (
        f"the conditions ({t.kind}) of windows (row, column) {_cells(t.windows)} at scale {t.scale}"
    ),
    tasks.LoadSource: lambda t: "the pixels of order.source.image",
    tasks.SamplePrior: lambda t: "the embeddings that the grid prior drew",
    tasks.InvertImage: lambda t: f"the embeddings inferred from an image at scale {t.scale}",
    tasks.DenoiseGuide: lambda t: f"the guide's frames at scale {t.scale}",
    tasks.DenoiseWindows: lambda t: (
        f"the latents of windows (row, column) {_cells(t.windows)} at scale {t.scale} "
        f"after steps {t.first + 1} to {t.last}"
    ),
    tasks.DenoiseBand: lambda t: f"the latents of band {t.band} at step {t.step}",
    tasks.DenoiseMosaicRow: lambda t: (
        f"the latents of row {t.row} of windows at correction {t.look}"
    ),
    tasks.DecodeBand: lambda t: f"the decoded pixel rows {t.top} to {t.bottom - 1}",
    tasks.DecodePatches: lambda t: "the decoded patches",
}
