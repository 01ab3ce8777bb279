"""Super-resolution by 2^n: windows whose downsampled images equal a given image.

    y [3, q rows, q columns] -cut-> blocks [B, 3, q, q] -constrain every step of-> windows
                                             q = P / 2^n, canvas P rows x P columns

It is Algorithm S2 with y fixed to an image at a coarser scale, where joint sampling has the
guide's frames; the task's `guided_by` names that scale. The baseline is a ControlNet that reads
the blocks. Conditions come from anywhere, as published from `invert`, whose grid of y has the
tokens of each window at its row and column. Source: ZoomLDM, section 4.4.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.models.bundle import Bundle
from raylarge.models.controlnet import Controlled, lift
from raylarge.sampling.canvas import gather
from raylarge.sampling.tasks import DenoiseWindows
from raylarge.sampling.trajectory import Target


def layout(size: tuple[int, int], levels: int, patch: Patch) -> tuple[int, int]:
    """Rows and columns of the windows that super-resolve an image of a size by 2^levels.

    Raises:
        UserError: a factor that does not fit the patch, or an image that no whole windows cover.
    """
    if levels < 1 or patch.side_px % (1 << levels):
        largest = (patch.side_px & -patch.side_px).bit_length() - 1
        raise UserError(
            f"super-resolution by 2^{levels} does not fit patches of {patch.side_px} px; "
            f"choose 2^1 to 2^{largest}."
        )
    q = patch.side_px >> levels
    if any(length < q or length % q for length in size):
        raise UserError(
            f"an image of {size[0]}x{size[1]} px cannot be super-resolved {1 << levels}x; "
            f"crop or pad it to multiples of {q} px."
        )
    return size[0] // q, size[1] // q


def blocks(
    y: Float[Tensor, "3 rows columns"], task: DenoiseWindows, patch: Patch
) -> Float[Tensor, "B 3 q q"]:
    """Each window's block of y, the image at scale `task.guided_by`.

    Raises:
        UserError: y does not fit the windows (`layout`), or a window lies outside it.
    """
    levels = (task.guided_by or 0) - task.scale
    rows, columns = layout((y.shape[1], y.shape[2]), levels, patch)
    outside = [(r, k) for r, k in task.windows if not (0 <= r < rows and 0 <= k < columns)]
    if outside:
        raise UserError(
            f"windows {outside} lie outside the {rows}x{columns} windows of an image of "
            f"{y.shape[1]}x{y.shape[2]} px; ask for windows inside."
        )
    q = patch.side_px >> levels
    return gather(y, [(row * q, column * q) for row, column in task.windows], q)


def fixed(y: Float[Tensor, "3 rows columns"], task: DenoiseWindows, patch: Patch) -> Target:
    """What windows should look like in every step: their blocks of y, in [-1, 1].

    Raises:
        UserError: as `blocks`.
    """
    target = blocks(y, task, patch)
    return lambda step: target


def controlled(
    bundle: Bundle, task: DenoiseWindows, y: Float[Tensor, "3 rows columns"]
) -> Controlled:
    """The baseline: the bundle's U-Net under its ControlNet, which sees each window's block of y.

    A denoiser for this batch of windows alone. Guide it, and run it unconstrained:
    `trajectory.windows`, with `guided_by` None. Source: ZoomLDM, section 4.4, Table 3.

    Raises:
        UserError: as `blocks`, or the bundle has no ControlNet.
    """
    if bundle.controlnet is None:
        raise UserError("the bundle has no ControlNet; train one, or super-resolve without it.")
    control = lift(blocks(y, task, bundle.patch), bundle.patch.side_px)
    return Controlled(bundle.unet, bundle.controlnet, bundle.schedule, control)
