"""The cost of images: FLOPs of each network, and seconds on a GPU.

    networks -forward_flops-> CallFlops ┐
                             CallCounts ┴-> total_flops -> seconds

A FLOP is a multiplication or an addition (2 per MAC). Convolutions, matrix products and attention
count, everything else is neglected.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raylarge.geometry import Patch
from raylarge.models.autoencoder import Autoencoder
from raylarge.models.bundle import Bundle

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class CallFlops:
    """FLOPs of one evaluation for one window; of the grid prior, for one cell of a grid.

    `small_decode` and `small_encode` are those of the small autoencoder.
    """

    unet: float
    decode: float
    encode: float
    cdm: float = 0.0
    prior: float = 0.0
    control: float = 0.0
    small_decode: float = 0.0
    small_encode: float = 0.0


@dataclass(frozen=True)
class CallCounts:
    """Evaluations of the networks, in the units of `CallFlops`."""

    unet: int = 0
    decode: int = 0
    encode: int = 0
    cdm: int = 0
    prior: int = 0
    control: int = 0
    small_decode: int = 0
    small_encode: int = 0

    def __add__(self, other: CallCounts) -> CallCounts:
        return CallCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def on_meta(network: Network) -> Network:
    """Return a float32 copy of a network on the meta device: its shapes without its weights."""
    tensors = [*network.parameters(), *network.buffers()]
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in tensors
    }
    copied = copy.deepcopy(network, memo)
    nn.Module.float(copied)  # diffusers' own `float` may warn
    return copied


def forward_flops(network: nn.Module | Callable[..., Any], *inputs: Tensor) -> int:
    """Count the FLOPs of one call of a network without computing it.

    Args:
        network: a module on any device, or a function such as the `decode` of an autoencoder on
            the meta device (`on_meta`).
        inputs: float32 tensors of the call's shapes, on any device.
    """
    call = on_meta(network) if isinstance(network, nn.Module) else network
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused operator is not counted
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(*(tensor.to("meta") for tensor in inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


_CELLS = 16
"""Side of the grid from which the grid prior's cost per cell is computed."""


def bundle_flops(bundle: Bundle) -> CallFlops:
    """Return the FLOPs of all networks of a bundle."""
    tokens, width = bundle.summarizer.null(1).shape[1:]
    flops = network_flops(bundle.unet, bundle.vae, bundle.patch, (tokens, width))
    index = torch.zeros(1, dtype=torch.long)
    if bundle.cdm is not None:
        x_t = torch.empty(1, bundle.cdm.config.channels, bundle.cdm.config.tokens)
        flops = replace(flops, cdm=float(forward_flops(bundle.cdm, x_t, index, index)))
    if bundle.prior is not None:
        grid = torch.empty(1, bundle.prior.config.channels, _CELLS, _CELLS)
        vector = torch.empty(1, bundle.prior.config.vector)
        flops = replace(flops, prior=forward_flops(bundle.prior, grid, index, vector) / _CELLS**2)
    if bundle.vae_small is not None:
        small = network_flops(bundle.unet, bundle.vae_small, bundle.patch, (tokens, width))
        flops = replace(flops, small_decode=small.decode, small_encode=small.encode)
    if bundle.controlnet is not None:
        patch, network = bundle.patch, on_meta(bundle.controlnet)
        image = torch.empty(1, 3, patch.side_px, patch.side_px, device="meta")
        call = partial(network, controlnet_cond=image, return_dict=False)
        x_t, context = torch.empty(1, *patch.latent), torch.empty(1, tokens, width)
        flops = replace(flops, control=float(forward_flops(call, x_t, index, context)))
    return flops


def network_flops(
    unet: nn.Module, autoencoder: Autoencoder, patch: Patch, context: tuple[int, int]
) -> CallFlops:
    """Return the FLOPs of U-Net and autoencoder.

    Args:
        unet: called as (x_t, t, context).
        patch: sizes of an image and its latent.
        context: (tokens, width) of the condition of one window.
    """
    codec = on_meta(autoencoder)
    latent, image = torch.empty(1, *patch.latent), torch.empty(1, 3, patch.side_px, patch.side_px)
    timestep, tokens = torch.empty(1, dtype=torch.long), torch.empty(1, *context)
    return CallFlops(
        unet=float(forward_flops(unet, latent, timestep, tokens)),
        decode=float(forward_flops(codec.decode, latent)),
        encode=float(forward_flops(codec.encode, image)),
    )


def total_flops(counts: CallCounts, costs: CallFlops) -> float:
    """Return the FLOPs of all evaluations together."""
    return sum(n * each for n, each in zip(astuple(counts), astuple(costs), strict=True))


def seconds(counts: CallCounts, costs: CallFlops, tflops: float) -> float:
    """Return the seconds of all evaluations.

    Args:
        tflops: attained rate in 10^12 FLOP/s: GPUs x utilisation x peak of one GPU.

    Raises:
        ValueError: a rate that is not positive.
    """
    if not tflops > 0:
        raise ValueError(f"a rate of {tflops} TFLOP/s is not positive")
    return total_flops(counts, costs) / (tflops * 1e12)


@torch.no_grad()
def measured_tflops(bundle: Bundle, costs: CallFlops, evaluations: int = 2) -> float:
    """Measure the rate of the bundle's U-Net on its device for one latent, in 10^12 FLOP/s.

    The fastest of `evaluations` counts, after one that warms up. Smaller networks reach less,
    larger batches may reach more.
    """
    device, dtype = bundle.device, next(bundle.unet.parameters()).dtype
    x_t = torch.zeros(1, *bundle.patch.latent, device=device, dtype=dtype)
    t = torch.zeros(1, dtype=torch.long, device=device)
    context = bundle.summarizer.null(1).to(device, dtype)
    durations = []
    for _ in range(1 + evaluations):
        began = time.perf_counter()
        bundle.unet(x_t, t, context).sum().item()  # waits for the device
        durations.append(time.perf_counter() - began)
    return costs.unet / min(durations[1:]) / 1e12
