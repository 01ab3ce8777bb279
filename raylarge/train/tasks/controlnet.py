"""Task `controlnet`: a ControlNet for super-resolution, on the bundle's frozen U-Net.

    image -A by a factor-> low resolution -lift-> control -ControlNet-> residuals -> U-Net

Loss: that of the U-Net, on what it predicts. With probability p the embeddings' tokens are
dropped, as in the U-Net's own training; the control stays, so guidance has both its halves.
Source: ZoomLDM section 4.4, Table 3 (the baseline); Zhang et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from raylarge import images
from raylarge.diffusion.loss import mse_per_sample, training_draws
from raylarge.diffusion.noise import generator, normal, split_64
from raylarge.diffusion.solvers import solve
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models import controlnet as controlnets
from raylarge.models.bundle import Bundle
from raylarge.models.controlnet import Controlled, lift
from raylarge.models.denoiser import bind_context
from raylarge.resample import downsample
from raylarge.train.ingest import Ingest, latents_table
from raylarge.train.monitor.sample_grid import AT_ONCE, spread
from raylarge.train.task import Batch, DataFacts, Run, SampleSource
from raylarge.train.tasks.ldm import check_conditioner, condition

SHEET_STEPS = 10


@dataclass(frozen=True)
class ControlnetConfig:
    """What the ControlNet learns; its size is that of the U-Net's encoder.

    Attributes:
        factors: of super-resolution, one drawn for each sample; powers of two.
        drop: share of samples whose embeddings are dropped; the control stays.
    """

    factors: tuple[int, ...] = (4,)
    drop: float = 0.1

    def check(self, side: int) -> None:
        """Refuse values that make no sense for patches of a side, in px.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        largest = side & -side
        unfit = [f for f in self.factors if f < 2 or f & (f - 1) or f > largest]
        if unfit or not self.factors:
            known = ", ".join(str(1 << i) for i in range(1, largest.bit_length()))
            raise UserError(
                f"controlnet.factors={list(self.factors)}: patches of {side} px take one or more "
                f"of {known}."
            )
        if not 0 <= self.drop <= 1:
            raise UserError(f"controlnet.drop={self.drop}: it must be 0 to 1.")


class ControlnetLoss(nn.Module):
    """The ControlNet and its loss per sample; what it controls is frozen and no part of it."""

    def __init__(self, controlnet: nn.Module, bundle: Bundle, drop: float) -> None:
        super().__init__()
        self.controlnet, self.drop = controlnet, drop
        self.schedule = bundle.schedule
        self.frozen = [bundle.unet, bundle.summarizer]  # in a list: no submodules

    def forward(self, batch: Batch) -> Float[Tensor, " B"]:
        """The loss of each sample."""
        x_0, eps, t = batch["latent"], batch["eps"], batch["t"]
        unet, summarizer = (part.to(x_0.device) for part in self.frozen)
        with torch.no_grad():
            tokens = condition(summarizer, batch)
        kept = (batch["coin"] >= self.drop)[:, None, None]
        tokens = torch.where(kept, tokens, summarizer.null(len(tokens)))
        x_t = self.schedule.noised(x_0, eps, t)
        down, middle = self.controlnet(
            x_t, t, tokens, controlnet_cond=batch["control"], return_dict=False
        )
        output = unet(
            x_t,
            t,
            tokens,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        )
        return mse_per_sample(output, self.schedule.target(x_0, eps, t))


class ControlnetTask:
    """Trains a ControlNet on a bundle."""

    def __init__(self, config: ControlnetConfig, bundle: Bundle, seed: int) -> None:
        """A ControlNet that adds nothing yet."""
        controlnet = controlnets.build(bundle.unet, bundle.patch.factor)
        self.network, self.averaged = ControlnetLoss(controlnet, bundle, config.drop), controlnet
        self.bundle, self.factors, self.seed = bundle, config.factors, seed

    def draw(self, batch: Batch) -> Batch:
        """The batch with timesteps, noise, the coin that drops embeddings, and controls."""
        samples, shape = batch["sample"], batch["latent"].shape[1:]
        drawn = training_draws(
            samples, shape, self.seed, "controlnet-train", self.network.schedule.length
        )
        control = controls(batch["image"], self._factors(samples))
        return {**batch, **drawn._asdict(), "control": control}

    def sheet(self, batch: Batch) -> UInt8[np.ndarray, "H W 3"]:
        """Low resolution, what ten steps of DDIM make of it without guidance, and the original."""
        few = spread(batch, max(1, AT_ONCE // len(set(batch["scale"].tolist()))))
        image, factors = few["image"], self._factors(few["sample"])
        low = [_pixels(one, factor) for one, factor in zip(image, factors, strict=True)]
        made = images.to_uint8(self._made(few, controls(image, factors)))
        rows = {"low": low, "made": list(made), "original": list(images.to_uint8(image))}
        side = min(max(image.shape[-1], 128), 256)
        return images.sheet(list(rows.values()), list(rows), cell_px=side)

    @torch.no_grad()
    def _made(self, batch: Batch, control: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B 3 P P"]:
        """Images that the U-Net draws under a control, each from the noise at its address."""
        controlnet, schedule = self.network.controlnet, self.bundle.schedule
        device = next(controlnet.parameters()).device
        unet, summarizer = (part.to(device) for part in self.network.frozen)
        tokens = condition(summarizer, batch)
        addresses = _addresses(batch["sample"])
        noise = normal(batch["latent"].shape[1:], self.seed, "controlnet-sheet", addresses)
        estimate = bind_context(Controlled(unet, controlnet, schedule, control), tokens)
        x_0 = solve(estimate, noise.to(device), schedule, "ddim", SHEET_STEPS)
        vae = self.bundle.vae.to(device)  # one by one: a decoder at full size is large
        return torch.cat([vae.decode(one[None]).cpu() for one in x_0])

    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Write `controlnet/` (averaged)."""
        if averaged is not None:
            self.network.controlnet.load_state_dict(averaged)
        bundles.save(bundle, {"controlnet": self.network.controlnet.cpu()}, {"controlnet": facts})

    def _factors(self, samples: Tensor) -> list[int]:
        """Each sample's factor, drawn at its address."""
        at = (generator(self.seed, "controlnet-factor", *one) for one in _addresses(samples))
        return [self.factors[int(one.integers(len(self.factors)))] for one in at]


def controls(image: Float[Tensor, "B 3 P P"], factors: Sequence[int]) -> Float[Tensor, "B 3 P P"]:
    """What a ControlNet sees of images: each at its low resolution, lifted to the patch again.

    The low resolution is rounded to bytes, as an image is that somebody wants enlarged.
    """
    low = (images.to_float(_pixels(one, f)) for one, f in zip(image, factors, strict=True))
    return torch.cat([lift(one[None], image.shape[-1]) for one in low])


def _pixels(image: Float[Tensor, "3 P P"], factor: int) -> UInt8[np.ndarray, "q q 3"]:
    """A(image)."""
    return images.to_uint8(downsample(image, factor))


def _addresses(samples: Tensor) -> list[tuple[int, int]]:
    return [split_64(sample) for sample in samples.tolist()]


def source(config: ControlnetConfig, run: Run, split: str = "train") -> SampleSource:
    """Latents of the bundle's autoencoder with their grids and images.

    Embeddings of regions are left out: sampling under a control gives none either.

    Raises:
        UserError: as `latents_table` and `Ingest`.
    """
    latents = latents_table(run.data, run.out)
    columns = {latents: ("latent", "grid"), "examples": ("image",)}
    return Ingest(run.data, columns, run.recipe, split)


def build(config: ControlnetConfig, run: Run, facts: DataFacts) -> ControlnetTask:
    """The task, its weights those of the U-Net's encoder and drawn from the training's seed.

    Raises:
        UserError: the bundle `out` is not whole yet, or factors that its patches do not have.
    """
    config.check(facts.image[-1])
    bundle = bundles.load(run.out, without={"cdm", "prior", "controlnet", "vae_small"})
    check_conditioner(bundle.summarizer, facts, run.out)
    for part in (bundle.vae, bundle.unet, bundle.summarizer):
        part.eval().requires_grad_(False)
    if run.recipe.channels_last:
        bundle.unet.to(memory_format=torch.channels_last)
    if run.recipe.checkpointing:  # the gradient passes through it to the residuals
        bundle.unet.enable_gradient_checkpointing()
    torch.manual_seed(run.recipe.seed)  # here: loading draws weights, too, of whatever there is
    return ControlnetTask(config, bundle, run.recipe.seed)
