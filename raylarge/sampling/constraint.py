"""The constraint of joint sampling: windows should look like the guide when made small.

Algorithm S2 (ZoomLDM supplement), per correction, with A the bicubic downsampling and U the
bicubic upsampling in place of A^T (U = s^2 A^T; see `resample`):

    e_img = U (y - A Dec(x_0(x_t)))        e = dEnc/dimage . e_img
    g     = d x_0/d x_t . e                x_t <- x_t + lambda g

The formulas as printed ascend the error; this descends, as the authors' code does.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.linearize import linearize
from raylarge.models.autoencoder import Codec
from raylarge.order import Sampler
from raylarge.resample import downsample, upsample

Function = Callable[[Tensor], Tensor]


def differentiated(f: Function, at: Tensor, sampler: Sampler) -> tuple[Tensor, Function]:
    """The value of f at a point, and its derivative there by direction: a pass each.

    `jvp` is exact in every precision (`diffusion/linearize.py`); `difference` is the papers'
    (f(x + d v) - f(x)) / d, which loses its digits in half precision.
    """
    if sampler.derivative == "jvp":
        return linearize(f, at)
    value = f(at)
    return value, lambda v: (f(at + sampler.fd_epsilon * v) - value) / sampler.fd_epsilon


def correct(
    x_t: Float[Tensor, "B c p p"],
    x_0: Function,
    autoencoder: Codec,
    y: Float[Tensor, "B 3 q q"],
    sampler: Sampler,
) -> Float[Tensor, "B c p p"]:
    """One correction of x_t towards windows whose downsampled images equal y.

    Args:
        x_0: the denoiser at this step, a function of x_t alone.
        y: each window's block of the guide's frame.
    """
    estimate, along = differentiated(x_0, x_t, sampler)
    image = autoencoder.decode(estimate)
    factor = image.shape[-1] // y.shape[-1]
    e_img = upsample(y - downsample(image, factor), factor)
    e = encoded(autoencoder, image, e_img, sampler)
    return x_t + sampler.correction_lr * scaled(along(e), sampler)


def encoded(
    autoencoder: Codec,
    image: Float[Tensor, "B 3 P P"],
    e_img: Float[Tensor, "B 3 P P"],
    sampler: Sampler,
) -> Float[Tensor, "B c p p"]:
    """e: an error of the image as one of its latent."""
    _, along = differentiated(autoencoder.encode, image, sampler)
    return scaled(along(scaled(e_img, sampler)), sampler)


def scaled(direction: Tensor, sampler: Sampler) -> Tensor:
    """The direction divided by its largest magnitude per window, if the recipe says so."""
    if not sampler.normalize:
        return direction
    return direction / direction.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
