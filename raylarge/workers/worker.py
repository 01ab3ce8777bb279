"""The worker: a bundle that answers requests, one at a time, on one device.

It knows the models and nothing of plans, orders in flight or other workers. The same object
answers in a notebook (`plan.run`), in an actor pool and behind Ray Serve.
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
        # The released seam removal tells its network t + 1, and so does ours.
        self._told_late = denoiser or network(timestep_offset=1)

    @classmethod
    def opened(cls, folder: str, means: ComputeConfig) -> Worker:
        """The worker of a bundle's folder, on whatever device this process may use."""
        device = "cpu" if means.gpus == 0 else default_device()
        bundle = load(folder, device, means.torch_dtype)
        return cls(bundle, compiled=means.compile)

    @torch.no_grad()
    def answer(self, task: Task, *inputs: Any) -> Any:
        """The reply to a task, from the replies it takes; both on the CPU, wherever the models are.

        Raises:
            UserError: the bundle lacks what the task needs, or the reply is not finite.
        """
        device = self.bundle.device
        moved = [i.to(device) if isinstance(i, Tensor) else i for i in inputs]
        reply = self._answer(task, *moved)
        check_reply(task, reply)
        if isinstance(reply, Parts):
            return Parts(reply.whole.cpu(), tuple(part.cpu() for part in reply.parts))
        return reply.cpu() if isinstance(reply, Tensor) else reply

    @singledispatchmethod
    def _answer(self, task: Task, *inputs: Any) -> Any:
        raise TypeError(f"no worker answers {type(task).__name__}")

    @_answer.register
    def _draw(self, task: EncodeContext, *inputs: Tensor) -> Float[Tensor, "n ..."]:
        return self._conditions.draw(task, *inputs)

    @_answer.register
    def _given(self, task: LoadSource) -> Float[Tensor, "3 rows columns"]:
        return self._conditions.given(task)

    @_answer.register
    def _invert(self, task: InvertImage, y: Tensor) -> Float[Tensor, "C rows columns"]:
        return self._conditions.invert(task, y)

    @_answer.register
    def _imagine(self, task: SamplePrior) -> Float[Tensor, "C rows columns"]:
        return self._conditions.imagine(task)

    @_answer.register
    def _guide(self, task: DenoiseGuide, tokens: Tensor) -> Float[Tensor, "S1 3 P P"]:
        return trajectory.guide(self._networks(task.order, tokens), task, tokens)

    @_answer.register
    def _windows(self, task: DenoiseWindows, tokens: Tensor, *rest: Tensor) -> Tensor | Parts:
        replies, wanted = list(rest), None
        above = replies.pop(0) if task.guided_by is not None else None
        x_t = replies.pop(0) if task.first else None
        given = above if task.given else None
        if given is not None and task.order.source.control:
            denoiser: Denoiser = superres.controlled(self.bundle, task, given)
        else:
            denoiser = self._denoiser
            if given is not None:
                wanted = superres.fixed(given, task, self.bundle.patch)
            elif above is not None:
                wanted = trajectory.below(above, task)
        networks = self._networks(task.order, tokens, denoiser)
        return trajectory.windows(networks, task, tokens, wanted, x_t)

    @_answer.register
    def _mosaic(self, task: DenoiseMosaicRow, tokens: Tensor, *rest: Tensor) -> Tensor | Parts:
        return mosaic.answer(self._networks(task.order, tokens), task, tokens, *rest)

    @_answer.register
    def _decode(self, task: DecodeBand, *latents: Tensor) -> UInt8[np.ndarray, "rows W 3"]:
        patch, order = self.bundle.patch, task.order
        if task.bands:
            latent, first = torch.cat(latents, dim=1), task.bands[0]
        else:
            latent, first = canvas.arranged(latents, task.windows, order.size[1] // patch.factor)
        band = canvas.PixelBand(task.top, task.bottom, order.size[0], first * patch.side_lat)
        image = canvas.decode_band(self._codec, latent, band, patch, order.batch)
        check_reply(task, image)
        return to_uint8(image)

    @_answer.register
    def _band(self, task: DenoiseBand, *inputs: Tensor) -> Float[Tensor, "d rows W"]:
        patch, replies = self.bundle.patch, list(inputs)
        vectors = replies.pop(0) if task.vectors else None
        here = bands.Canvas(task, patch.latent, patch.factor, self._denoiser.schedule)
        if task.step:
            x_t = here.down(list(zip(task.neighbours, replies, strict=True)))
        elif task.refine:
            latent, _ = canvas.arranged(replies, task.groups, here.width, here.rows)
            x_t = here.start(latent)
        else:
            x_t = here.start(None).to(self.bundle.device)
        if task.step == len(here.steps):
            return x_t[:, : patch.side_lat]
        return here.ask(x_t, self._estimates(task, vectors))

    def _estimates(self, task: DenoiseBand, vectors: Tensor | None) -> bands.Estimate:
        """What asks the denoiser for a band's windows, each under its own embedding.

        Canvases are float32; the networks see their own precision.
        """
        conditioner = self.bundle.summarizer
        plain = self._told_late if task.refine else self._denoiser
        null, sampler = conditioner.null(1), task.order.sampler

        def estimate(cut: Tensor, windows: list[int], t: int) -> Tensor:
            """x_0 of some windows, each under its embedding."""
            if vectors is None:
                return plain(cut, t, conditioner.null(len(cut)))
            scale = torch.full((len(cut),), task.order.scale, device=cut.device)
            tokens = conditioner(vectors[windows][..., None, None], scale)
            asked = guided(plain, sampler.guidance, null, sampler.interval)
            return asked(cut, t, tokens)

        return estimate

    @_answer.register
    def _decode_each(self, task: DecodePatches, latents: Tensor) -> UInt8[np.ndarray, "B P P 3"]:
        decoded = self._codec.decode(latents)
        check_reply(task, decoded)
        return to_uint8(decoded)

    def _networks(
        self, order: Order, tokens: Tensor, denoiser: Denoiser | None = None
    ) -> trajectory.Networks:
        """Guided, unless the tokens are the null condition, which guidance would not change."""
        null = self.bundle.summarizer.null(1).to(tokens)
        sampler, bundle = order.sampler, self.bundle
        w = 1.0 if torch.equal(tokens, null.expand_as(tokens)) else sampler.guidance
        denoiser = guided(denoiser or self._denoiser, w, null, sampler.interval)
        small = bundle.vae_small if sampler.small_autoencoder else None
        return trajectory.Networks(denoiser, self._codec, bundle.patch, small)


class _Compiled:
    """An autoencoder whose decoder is compiled; derivatives are taken of the encoder alone."""

    def __init__(self, codec: Codec) -> None:
        self.encode, self.decode = codec.encode, torch.compile(codec.decode, dynamic=False)
