"""The correction by backpropagation through the decoder, to compare ours with.

Algorithm S1 (ZoomLDM supplement, of Graikos et al. 2023), per correction:

    e = - d/dx_0 |A Dec(x_0(x_t)) - y|^2     g = d x_0/d x_t . e     x_t <- x_t + lambda g

As printed it ascends the error; this descends. With an orthogonal decoder (whose derivative's
transpose is the encoder's) e is 2 / s^2 times that of `constraint.correct`, s the downsampling
factor: U = s^2 A^T, and the square's 2 is kept here. Divided by its largest magnitude
(`sampler.normalize`) it is the same. It keeps a whole decoder's activations in memory.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from raylarge.models.autoencoder import Codec
from raylarge.order import Sampler
from raylarge.resample import downsample
from raylarge.sampling.constraint import Function, differentiated, scaled


def correct_by_backprop(
    x_t: Float[Tensor, "B c p p"],
    x_0: Function,
    autoencoder: Codec,
    y: Float[Tensor, "B 3 q q"],
    sampler: Sampler,
) -> Float[Tensor, "B c p p"]:
    """One correction of x_t towards windows whose downsampled images equal y.

    Arguments as of `constraint.correct`; windows never meet.
    """
    with torch.no_grad():
        estimate, along = differentiated(x_0, x_t, sampler)
    with torch.enable_grad():
        estimate = estimate.detach().requires_grad_()
        image = autoencoder.decode(estimate)
        error = downsample(image, image.shape[-1] // y.shape[-1]) - y
        (gradient,) = torch.autograd.grad(error.square().sum(), estimate)
    return x_t + sampler.correction_lr * scaled(along(scaled(-gradient, sampler)), sampler)
