"""What an image costs: FLOPs of the networks, evaluations of an algorithm, seconds on a card.

    networks -forward_flops-> Costs ┐
    N, S, K, g, m -joint, ...-> Counts ┴-> flops -> seconds

A FLOP is a multiplication or an addition (2 per MAC); convolutions, matrix products and
attention count, the rest is left out. N patches, S steps, K corrections per step, g passes
per denoising (2 under guidance), m further denoisings per correction.
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

from raylarge.geometry import Patch, origins
from raylarge.models.autoencoder import Autoencoder
from raylarge.models.bundle import Bundle

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class CallFlops:
    """FLOPs of one evaluation for one window.

    Attributes:
        unet: one pass of the U-Net over one latent.
        decode: one patch from its latent.
        encode: one latent from its patch.
        cdm: one pass of the CDM over the tokens of one window.
        prior: one pass of the grid prior, per cell of the grid.
        control: one pass of the ControlNet over one latent.
        small_decode: as `decode`, of the small autoencoder.
        small_encode: as `encode`, of the small autoencoder.
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
    """Evaluations of the networks, each for one window (the prior's: for one cell of a grid).

    Sums of counts are counts.
    """

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
    """Return a float32 copy of a network on the meta device: its shapes without its weights.

    FLOPs do not depend on the precision, so a network in half precision is counted like any
    other, with inputs in float32.
    """
    tensors = [*network.parameters(), *network.buffers()]
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in tensors
    }
    copied = copy.deepcopy(network, memo)
    nn.Module.float(copied)  # diffusers' own `float` warns of modules that it keeps in float32
    return copied


def forward_flops(network: nn.Module | Callable[..., Any], *inputs: Tensor) -> int:
    """FLOPs of one call of a network; nothing is computed.

    Args:
        network: a module, on any device; or a function of tensors such as the `decode` of an
            autoencoder that is on the meta device already (`on_meta`).
        inputs: tensors of the call's shapes and dtypes, on any device.
    """
    call = on_meta(network) if isinstance(network, nn.Module) else network
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operator that nobody counts
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(*(tensor.to("meta") for tensor in inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


_CELLS = 16
"""Side of the grid that a grid prior's cost per cell is taken of."""


def bundle_flops(bundle: Bundle) -> CallFlops:
    """The costs of all networks of a bundle."""
    context = bundle.summarizer.null(1).shape[1:]
    found = network_flops(bundle.unet, bundle.vae, bundle.patch, (context[0], context[1]))
    one = torch.zeros(1, dtype=torch.long)
    if bundle.cdm is not None:
        x_t = torch.empty(1, bundle.cdm.config.channels, bundle.cdm.config.tokens)
        found = replace(found, cdm=float(forward_flops(bundle.cdm, x_t, one, one)))
    if bundle.prior is not None:
        grid = torch.empty(1, bundle.prior.config.channels, _CELLS, _CELLS)
        vector = torch.empty(1, bundle.prior.config.vector)
        whole = forward_flops(bundle.prior, grid, one, vector)
        found = replace(found, prior=whole / _CELLS**2)
    if bundle.vae_small is not None:
        small = network_flops(bundle.unet, bundle.vae_small, bundle.patch, (context[0], context[1]))
        found = replace(found, small_decode=small.decode, small_encode=small.encode)
    if bundle.controlnet is not None:
        patch, network = bundle.patch, on_meta(bundle.controlnet)
        image = torch.empty(1, 3, patch.side_px, patch.side_px, device="meta")
        call = partial(network, controlnet_cond=image, return_dict=False)
        x_t, tokens = torch.empty(1, *patch.latent), torch.empty(1, *context)
        found = replace(found, control=float(forward_flops(call, x_t, one, tokens)))
    return found


def network_flops(
    unet: nn.Module, autoencoder: Autoencoder, patch: Patch, context: tuple[int, int]
) -> CallFlops:
    """The costs of the networks that every bundle has.

    Args:
        unet: called as (x_t, t, context).
        patch: gives the shapes of an image and its latent.
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


def windows(size: tuple[int, int], side: int, stride: int) -> int:
    """How many overlapping windows cover a canvas, all in one unit: latent cells, or pixels.

    On a square canvas of side L that the strides divide, (floor((L - side) / stride) + 1)^2.

    Raises:
        ValueError: the canvas is smaller than a window, or the stride leaves gaps.
    """
    rows, columns = (len(origins(length, side, stride)) for length in size)
    return rows * columns


def joint(patches: int, steps: int, inner: int, guided: int = 2, again: int = 1) -> CallCounts:
    """Joint multi-scale sampling (Algorithm S2), the guide included, without the final decode.

    N S [g (1 + m K) U + K (D + 2 E)] + S (g U + D)

    Args:
        patches: N.
        steps: S.
        inner: K; 0 is sampling without the constraint.
        guided: g, 2 under classifier-free guidance and 1 without.
        again: m; 2 is a pass of the derivative and the estimate after the move; 1 leaves the
            latter out, 3 evaluates the base point once more, as `torch.func.jvp` does.
    """
    corrections = patches * steps * inner
    return CallCounts(
        unet=guided * (patches * steps + again * corrections + steps),
        decode=corrections + steps,
        encode=2 * corrections,
    )


def strided(count: int, steps: int, guided: int = 2) -> CallCounts:
    """Overlapping windows denoised together (Graikos et al.), without the final decode.

    n S g U

    Args:
        count: windows n.
        steps: S.
        guided: g, as in `joint`.
    """
    return CallCounts(unet=count * steps * guided)


def refine(count: int, steps: int = 6, guided: int = 2) -> CallCounts:
    """Seam removal: the steps of `strided` from a little noise; 6 as released."""
    return strided(count, steps, guided)


def decode(count: int) -> CallCounts:
    """The blended decode of n overlapping windows."""
    return CallCounts(decode=count)


def total_flops(counts: CallCounts, costs: CallFlops) -> float:
    """FLOPs of all evaluations together."""
    return sum(n * each for n, each in zip(astuple(counts), astuple(costs), strict=True))


def seconds(counts: CallCounts, costs: CallFlops, tflops: float) -> float:
    """Seconds of all evaluations at a rate.

    Args:
        counts: what an image takes.
        costs: what each evaluation takes.
        tflops: 10^12 FLOPs per second that are reached: cards x utilisation x a card's peak.

    Raises:
        ValueError: a rate that is not positive.
    """
    if not tflops > 0:
        raise ValueError(f"a rate of {tflops} TFLOP/s carries nothing out")
    return total_flops(counts, costs) / (tflops * 1e12)


@torch.no_grad()
def measured_tflops(bundle: Bundle, costs: CallFlops, evaluations: int = 2) -> float:
    """Return the rate, in 10^12 FLOP/s, of the bundle's own U-Net on this machine.

    One evaluation for one latent warms up, the fastest of the others counts. Networks in whose
    evaluations less is computed at a time are slower, larger batches may be faster.

    Args:
        bundle: on any device.
        costs: of its networks (`bundle_flops`).
        evaluations: how many are timed.
    """
    device, dtype = bundle.device, next(bundle.unet.parameters()).dtype
    x_t = torch.zeros(1, *bundle.patch.latent, device=device, dtype=dtype)
    t = torch.zeros(1, dtype=torch.long, device=device)
    context = bundle.summarizer.null(1).to(device, dtype)
    spent = []
    for _ in range(1 + evaluations):
        began = time.perf_counter()
        bundle.unet(x_t, t, context).sum().item()  # waits for the device
        spent.append(time.perf_counter() - began)
    return costs.unet / min(spent[1:]) / 1e12
