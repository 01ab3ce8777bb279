"""The worker: answers requests with the models of one bundle, on one device.

It does not depend on plans or other workers. The same class answers in a notebook (`plan.run`),
in an actor pool and behind Ray Serve.
"""

from __future__ import annotations

from functools import partial, singledispatchmethod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from raylarge.compute.config import ComputeConfig
from raylarge.images import to_uint8
from raylarge.models.autoencoder import Codec
from raylarge.models.bundle import Bundle, default_device, load
from raylarge.models.denoiser import Denoiser, NetworkDenoiser, guided
from raylarge.order import Order
from raylarge.sampling import bands, canvas, mosaic, superres, trajectory
from raylarge.sampling.tasks import (
    DecodeBand,
    DecodePatches,
    DenoiseBand,
    DenoiseGuide,
    DenoiseMosaicRow,
    DenoiseWindows,
    EncodeContext,
    InvertImage,
    LoadSource,
    Parts,
    SamplePrior,
    Task,
)
from raylarge.workers.conditions import Conditions
from raylarge.workers.finite import check_reply

SHAPES = 256
"""Shapes of batches that a compiled network may meet; each is compiled once."""


class Worker:
    """Answers the requests of any plan with one bundle.

    Args:
        bundle: the models.
        denoiser: in place of the bundle's own, for closed-form tests.
        compiled: whether to compile what no derivative is taken of.
    """

    def __init__(
        self, bundle: Bundle, denoiser: Denoiser | None = None, compiled: bool = False
    ) -> None:
        self.bundle, self._codec = bundle, bundle.vae
        fast = None
        if compiled:
            torch._dynamo.config.recompile_limit = SHAPES  # beyond it torch would go on eagerly
            fast = torch.compile(bundle.unet, dynamic=False)
            self._codec = _Compiled(bundle.vae)
        network = partial(NetworkDenoiser, bundle.unet, bundle.schedule, compiled=fast)
        self._denoiser = denoiser or network()
        self._conditions = Conditions(bundle)
        # The released seam removal passes t + 1 to its network, and so does ours.
        self._late_denoiser = denoiser or network(timestep_offset=1)

    @classmethod
    def opened(cls, folder: str, compute: ComputeConfig) -> Worker:
        """Return the worker of a bundle's folder, on the device of this process."""
        device = "cpu" if compute.gpus == 0 else default_device()
        bundle = load(folder, device, compute.torch_dtype)
        return cls(bundle, compiled=compute.compile)

    @torch.no_grad()
    def answer(self, task: Task, **inputs: Any) -> Any:
        """Return the reply to a task; inputs and replies are on the CPU.

        Args:
            task: the request.
            inputs: the replies that it takes, by name (`sampling/tasks.py`); some are lists.

        Raises:
            UserError: the bundle lacks a part that the task needs, or the reply is not finite.
        """
        reply = self._answer(
            task, **{name: _to_device(i, self.bundle.device) for name, i in inputs.items()}
        )
        check_reply(task, reply)
        if isinstance(reply, Parts):
            return Parts(reply.whole.cpu(), tuple(part.cpu() for part in reply.parts))
        return reply.cpu() if isinstance(reply, Tensor) else reply

    @singledispatchmethod
    def _answer(self, task: Task, **inputs: Any) -> Any:
        raise TypeError(f"no worker answers {type(task).__name__}")

    @_answer.register
    def _encode_context(
        self, task: EncodeContext, grid: Tensor | None = None
    ) -> Float[Tensor, "n ..."]:
        return self._conditions.encode(task, grid)

    @_answer.register
    def _load_source(self, task: LoadSource) -> Float[Tensor, "3 rows columns"]:
        return self._conditions.load_source(task)

    @_answer.register
    def _invert_image(self, task: InvertImage, image: Tensor) -> Float[Tensor, "C rows columns"]:
        return self._conditions.invert(task, image)

    @_answer.register
    def _sample_prior(self, task: SamplePrior) -> Float[Tensor, "C rows columns"]:
        return self._conditions.sample_prior(task)

    @_answer.register
    def _denoise_guide(self, task: DenoiseGuide, tokens: Tensor) -> Float[Tensor, "S1 3 P P"]:
        return trajectory.guide(self._networks(task.order, tokens), task, tokens)

    @_answer.register
    def _denoise_windows(
        self,
        task: DenoiseWindows,
        tokens: Tensor,
        target: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> Tensor | Parts:
        denoiser, by_step = self._denoiser, None
        if target is not None and not task.follows_image:
            by_step = trajectory.below(target, task)
        elif target is not None and task.order.source.control:
            denoiser = superres.controlled(self.bundle, task, target)
        elif target is not None:
            by_step = superres.fixed(target, task, self.bundle.patch)
        networks = self._networks(task.order, tokens, denoiser)
        return trajectory.windows(networks, task, tokens, by_step, latents)

    @_answer.register
    def _denoise_mosaic_row(
        self, task: DenoiseMosaicRow, tokens: Tensor, **inputs: Any
    ) -> Tensor | Parts:
        return mosaic.answer(self._networks(task.order, tokens), task, tokens, **inputs)

    @_answer.register
    def _decode_band(
        self, task: DecodeBand, latents: list[Tensor]
    ) -> UInt8[np.ndarray, "rows W 3"]:
        patch, order = self.bundle.patch, task.order
        if task.bands:
            latent, first = torch.cat(latents, dim=1), task.bands[0]
        else:
            latent, first = canvas.arranged(latents, task.windows, order.size[1] // patch.factor)
        band = canvas.PixelBand(task.top, task.bottom, order.size[0], first * patch.side_lat)
        return _pixels(task, canvas.decode_band(self._codec, latent, band, patch, order.batch))

    @_answer.register
    def _decode_patches(self, task: DecodePatches, latents: Tensor) -> UInt8[np.ndarray, "B P P 3"]:
        return _pixels(task, self._codec.decode(latents))

    @_answer.register
    def _denoise_band(
        self,
        task: DenoiseBand,
        vectors: Tensor | None = None,
        latents: list[Tensor] | None = None,
        neighbours: list[Tensor] | None = None,
    ) -> Float[Tensor, "d rows W"]:
        patch = self.bundle.patch
        band = bands.BandCanvas(task, patch.latent, patch.factor, self._denoiser.schedule)
        if neighbours:
            x_t = band.next_x_t(list(zip(task.neighbours, neighbours, strict=True)))
        elif latents:
            x_t = band.start(canvas.arranged(latents, task.groups, band.width, band.rows)[0])
        else:
            x_t = band.start(None).to(self.bundle.device)
        if task.step == len(band.steps):
            return x_t[:, : patch.side_lat]
        denoiser = self._late_denoiser if task.refine else self._denoiser
        return band.reply(x_t, _band_denoiser(denoiser, self.bundle, task, vectors))

    def _networks(
        self, order: Order, tokens: Tensor, denoiser: Denoiser | None = None
    ) -> trajectory.Networks:
        """Guided, unless the tokens are the null condition, which guidance would not change."""
        sampler, bundle = order.sampler, self.bundle
        null = bundle.summarizer.null(1).to(tokens)
        w = 1.0 if torch.equal(tokens, null.expand_as(tokens)) else sampler.guidance
        denoiser = guided(denoiser or self._denoiser, w, null, sampler.interval)
        small = bundle.vae_small if sampler.small_autoencoder else None
        return trajectory.Networks(denoiser, self._codec, bundle.patch, small)


def _band_denoiser(
    denoiser: Denoiser, bundle: Bundle, task: DenoiseBand, vectors: Tensor | None
) -> bands.Estimate:
    """Return the function that estimates x_0 of a band's windows, each under its embedding.

    Canvases are float32; the networks have their own precision.
    """
    conditioner, sampler = bundle.summarizer, task.order.sampler
    null = conditioner.null(1)

    def estimate(windows: Tensor, indices: list[int], t: int) -> Tensor:
        if vectors is None:
            return denoiser(windows, t, conditioner.null(len(windows)))
        scale = torch.full((len(windows),), task.order.scale, device=windows.device)
        tokens = conditioner(vectors[indices][..., None, None], scale)
        return guided(denoiser, sampler.guidance, null, sampler.interval)(windows, t, tokens)

    return estimate


def _pixels(task: Task, decoded: Tensor) -> UInt8[np.ndarray, "... 3"]:
    check_reply(task, decoded)
    return to_uint8(decoded)


def _to_device(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [_to_device(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value


class _Compiled:
    """An autoencoder whose decoder is compiled; derivatives are taken of the encoder alone."""

    def __init__(self, codec: Codec) -> None:
        self.encode, self.decode = codec.encode, torch.compile(codec.decode, dynamic=False)
