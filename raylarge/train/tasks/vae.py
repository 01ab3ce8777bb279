"""Task `vae`: an autoencoder on EXAMPLES of all scales: light, VQ or KL, or a small one distilled.

    loss = L1 + gradient · L1 of first differences + features · distance of EfficientNet-Lite0
           + lpips · LPIPS + adversarial · PatchGAN
           + VQ: |sg z - e|² + β |z - sg e|²  |  KL: λ Σ KL / 3 P²

First differences keep nuclei sharp without LPIPS. VQGAN (section 3.1) and Latent Diffusion
(appendix G): gradient=0, lpips=1, betas (0.5, 0.9), adversarial_from=50001; our weights are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor, nn

from raylarge import images
from raylarge.diffusion import noise
from raylarge.errors import UserError
from raylarge.metrics.restoration import psnr
from raylarge.models import bundle as bundles
from raylarge.models.autoencoder import Autoencoder, kl, vq
from raylarge.models.discriminator import Discriminator, DiscriminatorConfig, adversarial_loss
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.models.perceptual import SMALLEST, FeatureDistance, Perceptual
from raylarge.train.ingest import Ingest
from raylarge.train.task import Batch, DataFacts, Recipe, Run

KINDS = ("light", "vq", "kl")
_LEAST = {
    1: ("factor", "latent_channels", "width", "layers", "codes"),
    0: ("blocks", "gradient", "features", "lpips", "adversarial", "kl_weight", "commitment"),
}
_GROUPS = 32  # of channels that the VQ and KL networks normalise together
_SHOWN = 8  # images of a sheet
_ENCODED = 4  # images encoded at a time for statistics


@dataclass(frozen=True)
class VaeConfig:
    """Kind and size of the autoencoder, and what it learns.

    Attributes:
        kind: light, vq (its defaults are the published VQ-f4) or kl.
        distill: train `vae_small`, a light one of `width` and `blocks`, to imitate the bundle's
            own `vae`, whose factor and latent channels it takes. By default it has 1/168 of
            the FLOPs of VQ-f4's encoder and 1/327 of its decoder's (`models/cost.py`); width
            128 and 4 blocks have 1/34 and 1/66.
    """

    kind: str = "light"
    factor: int = 4  # pixels per latent cell along a side; vq, kl: 2^(levels - 1)
    latent_channels: int = 3  # channels of a latent
    width: int = 64  # light: channels
    blocks: int = 3  # light: residual blocks
    channels: tuple[int, ...] = (128, 256, 512)  # vq, kl: of each level, finest first
    layers: int = 2  # vq, kl: residual blocks of a level, one more in the decoder
    codes: int = 8192  # vq: size of the codebook
    gradient: float = 0.5  # weight of the first differences
    features: float = 0.0  # weight of the distance in EfficientNet-Lite0's first features
    lpips: float = 0.0  # weight of LPIPS
    lpips_backbone: str = ""  # VGG16 of torchvision; empty: its download. Example: vgg16.pth
    adversarial: float = 0.0  # weight of the generator's term; 0: no discriminator
    adversarial_from: int = 0  # the step from which on both of its networks' terms count
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    kl_weight: float = 1e-6  # kl: λ
    commitment: float = 0.25  # vq: β
    average: bool = False  # keep the moving average of the autoencoder
    distill: bool = False

    @property
    def part(self) -> str:
        """The part of the bundle that is trained."""
        return "vae_small" if self.distill else "vae"


class _Beside:
    """A fixed network that is no part of what is trained.

    Neither checkpoints nor the optimiser nor `train()` reach it; it goes where its input is.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network.eval().requires_grad_(False)

    def near(self, tensor: Tensor) -> Any:
        """The network, on the device of a tensor."""
        return self._network.to(tensor.device)


class _Trained(nn.Module):
    """The autoencoder, its discriminator if it has one, and their loss per sample."""

    part = "vae"

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.codec = Autoencoder(_network(config))
        self.judge = Discriminator(config.discriminator) if config.adversarial else None
        self.perceptual = _Beside(Perceptual(config.lpips_backbone)) if config.lpips else None
        self.features = _Beside(FeatureDistance()) if config.features else None

    def forward(self, batch: Batch) -> Float[Tensor, " B"]:
        """The loss of each sample.

        The adversarial terms are felt by gradients alone: their value, which tells nothing of
        the quality, is taken off, so that the loss stays comparable from the first step to the
        last. Until they count, the discriminator's gradient is 0 but there, as DDP wants it.
        """
        image, config = batch["image"], self.config
        made, loss = self._coded(batch)
        loss = loss + _distance(made, image, config.gradient)
        if self.features is not None:
            loss = loss + config.features * self.features.near(image)(made, image)
        if self.perceptual is not None:
            loss = loss + config.lpips * self.perceptual.near(image)(made, image)
        if self.judge is not None and torch.is_grad_enabled():
            if "judged" in batch:
                terms = (
                    adversarial_loss(self.judge, image, made, config.adversarial) * batch["judged"]
                )
            else:
                terms = 0.0 * sum(value.sum() for value in self.judge.parameters())
            loss = loss + (terms - terms.detach())
        return loss.float()

    def shown(self, image: Float[Tensor, "B 3 P P"]) -> dict[str, Float[Tensor, "B 3 P P"]]:
        """The rows of a sheet by their labels."""
        return {"original": image, "vae": self.codec.decode(self.codec.encode(image))}

    def _coded(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Reconstruction, and what each sample's latent adds to its loss."""
        image, codec, network = batch["image"], self.codec, self.codec.network
        if self.config.kind == "light":
            return codec.decode(codec.encode(image)), image.new_zeros(len(image))
        if self.config.kind == "vq":
            z = codec.encode(image)
            quantised, index = codec.quantise(z)
            e = network.quantize.embedding(index).movedim(-1, 1)
            made = network.decode(quantised, force_not_quantize=True, return_dict=False)[0]
            more = _squares(e, z.detach()) + self.config.commitment * _squares(z, e.detach())
            return made, more
        posterior = network.encode(image, return_dict=False)[0]
        z = posterior.mean + posterior.std * batch["noise"]
        made = network.decode(z, return_dict=False)[0]
        # Published as a sum over the latent beside the sum of all pixels' errors.
        return made, self.config.kl_weight * posterior.kl().float() / image[0].numel()


class _Distilled(nn.Module):
    """A light autoencoder that learns a fixed one's latents and images."""

    part = "vae_small"

    def __init__(self, config: VaeConfig, teacher: Autoencoder) -> None:
        super().__init__()
        self.gradient = config.gradient
        size = {"factor": teacher.factor, "latent_channels": teacher.channels}
        self.codec = Autoencoder(LightAutoencoder(width=config.width, blocks=config.blocks, **size))
        self.teacher = _Beside(teacher)

    def forward(self, batch: Batch) -> Float[Tensor, " B"]:
        """|ẑ - z|² + |D(z) - image of the teacher| + |D(z) - image|, of each sample.

        The teacher's latents z and images are deterministic: of a posterior the mean.
        """
        image = batch["image"]
        with torch.no_grad():
            teacher = self.teacher.near(image)
            z = teacher.encode(image)
            wanted = teacher.decode(z)
        made = self.codec.decode(z)
        loss = _squares(self.codec.encode(image), z)
        loss = loss + _distance(made, wanted, self.gradient)
        return (loss + _distance(made, image, self.gradient)).float()

    def shown(self, image: Float[Tensor, "B 3 P P"]) -> dict[str, Float[Tensor, "B 3 P P"]]:
        """The rows of a sheet by their labels."""
        teacher = self.teacher.near(image)
        z = teacher.encode(image)
        return {"original": image, "vae": teacher.decode(z), "vae_small": self.codec.decode(z)}


class VaeTask:
    """Trains an autoencoder, or distils a small one."""

    def __init__(
        self, network: _Trained | _Distilled, config: VaeConfig, recipe: Recipe, patch_px: int
    ) -> None:
        self.network, self.config, self.seed = network, config, recipe.seed
        self.batch, self.patch_px = recipe.batch, patch_px
        self.averaged = network.codec if config.average else None

    def draw(self, batch: Batch) -> Batch:
        """The batch with its images mirrored at random, a posterior's noise, and the gate.

        `judged` (1 where a sample's step feels the adversarial terms) is left out where no
        sample's does, which spares the discriminator's work.
        """
        addresses = [noise.split_64(n) for n in batch["sample"].tolist()]
        drawn = {**batch, "image": _mirrored(batch["image"], addresses, self.seed)}
        config, codec = self.config, self.network.codec
        if config.kind == "kl":
            side = self.patch_px // codec.factor
            shape = (codec.channels, side, side)
            drawn["noise"] = noise.normal(shape, self.seed, "posterior", addresses)
        judged = batch["sample"] // self.batch >= config.adversarial_from
        if config.adversarial and judged.any():
            drawn["judged"] = judged.float()
        return drawn

    @torch.no_grad()
    def sheet(self, batch: Batch) -> UInt8[ndarray, "H W 3"]:
        """Some images above their reconstructions, under the PSNR of the lowest row."""
        device = self.network.codec.network.device
        rows = self.network.shown(batch["image"][:_SHOWN].to(device))
        original, made = rows["original"], rows[self.network.part]
        decibels = psnr(made.float().clamp(-1, 1), original).tolist()
        cells = [list(images.to_uint8(row)) for row in rows.values()]
        return images.sheet(cells, list(rows), [f"{value:.1f} dB" for value in decibels])

    @torch.no_grad()
    def finish(
        self,
        bundle: str,
        averaged: dict[str, Tensor] | None,
        facts: dict[str, Any],
        batch: Batch,
    ) -> None:
        """Fit the latents' scale on training images; write `vae/` or `vae_small/`.

        A light one standardises each channel. A KL one divides by the latents' standard
        deviation (Latent Diffusion, appendix D.1). A VQ one's and a student's stay as they are.
        """
        codec = self.network.codec
        if averaged is not None:
            codec.load_state_dict(averaged)
        if isinstance(self.network, _Distilled):
            bundles.save(bundle, {"vae_small": codec.cpu()}, {"vae_small": facts})
            return
        if self.config.kind == "kl":
            device, present = codec.network.device, codec.network.config.scaling_factor
            some = batch["image"].split(_ENCODED)
            latents = torch.cat([codec.encode(image.to(device)) for image in some])
            codec.network.register_to_config(scaling_factor=present / float(latents.std()))
        codec.cpu()
        if self.config.kind == "light":
            codec.network.standardise(batch["image"])
        bundles.save(bundle, {"vae": codec}, {"patch_px": self.patch_px, "vae": facts})


def source(config: VaeConfig, run: Run, split: str = "train") -> Ingest:
    """The images of a split."""
    return Ingest(run.data, {"examples": ("image",)}, run.recipe, split)


def build(config: VaeConfig, run: Run, facts: DataFacts) -> VaeTask:
    """The task, its weights drawn from the training's seed.

    Raises:
        UserError: sizes, weights or a strategy that cannot be; no autoencoder to distil; no
            package or weights for LPIPS.
    """
    side = facts.image[-1]
    _check(config, side)
    if config.adversarial and run.recipe.by_deepspeed and run.recipe.zero == 3:
        raise UserError(
            "zero=3 shards the weights that vae.adversarial needs whole; give zero=2 or less."
        )
    torch.manual_seed(run.recipe.seed)
    if config.distill:
        network: Any = _Distilled(config, bundles.load_autoencoder(run.out))
    else:
        network = _Trained(config)
    factor = network.codec.factor
    if side % factor:
        raise UserError(f"images of {side} px cannot be coded by factor {factor}: it must divide.")
    return VaeTask(network, config, run.recipe, side)


def _check(config: VaeConfig, side: int) -> None:
    """Raises UserError: what no autoencoder can be made of, or what no image of that side fits."""
    if config.kind not in KINDS:
        raise UserError(f"vae.kind '{config.kind}' is none of {', '.join(KINDS)}.")
    for least, names in _LEAST.items():
        for name in names:
            if getattr(config, name) < least:
                raise UserError(f"vae.{name} is {getattr(config, name)}; give {least} or more.")
    other = config.features or config.lpips or config.adversarial
    if config.distill and (config.kind != "light" or other):
        raise UserError(
            "vae.distill makes a light autoencoder that learns from its teacher alone; "
            "leave out vae.kind, vae.features, vae.lpips and vae.adversarial."
        )
    factor = 2 ** (len(config.channels) - 1)
    misfit = config.factor != factor or any(width % _GROUPS for width in config.channels)
    if config.kind != "light" and misfit:
        raise UserError(
            f"vae.channels={list(config.channels)} is for vae.factor={factor}, not "
            f"{config.factor}, and {_GROUPS} must divide each; give one width per level."
        )
    if config.lpips and side < SMALLEST:
        raise UserError(f"LPIPS needs images of {SMALLEST} px, not {side}; leave vae.lpips out.")
    if config.adversarial:
        config.discriminator.check(side)


def _network(config: VaeConfig) -> nn.Module:
    if config.kind == "light":
        return LightAutoencoder(config.factor, config.latent_channels, config.width, config.blocks)
    if config.kind == "vq":
        codes = (config.codes, config.latent_channels)
        network: Any = vq(config.channels, config.layers, codes, config.latent_channels)
        # Its halves can do what diffusers denies of the whole: compute activations again.
        network._supports_gradient_checkpointing = True
        return network
    return kl(config.channels, config.layers, config.latent_channels, scale=1.0)


def _distance(
    made: Float[Tensor, "B 3 P P"], wanted: Float[Tensor, "B 3 P P"], gradient: float
) -> Float[Tensor, " B"]:
    """L1 of each image, and of its first differences along rows and columns."""
    error = made.float() - wanted.float()
    loss = error.abs().flatten(1).mean(dim=1)
    for axis in (2, 3) if gradient else ():
        loss = loss + gradient * error.diff(dim=axis).abs().flatten(1).mean(dim=1)
    return loss


def _squares(a: Float[Tensor, "B ..."], b: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
    """Mean squared difference of each sample."""
    return (a.float() - b.float()).square().flatten(1).mean(dim=1)


def _mirrored(
    image: Float[Tensor, "B 3 P P"], addresses: list[tuple[int, int]], seed: int
) -> Float[Tensor, "B 3 P P"]:
    """Each image flipped along rows, columns, both or neither, by its sample's address."""
    flips = [noise.generator(seed, "flip", *address).random(2) < 0.5 for address in addresses]
    mirrored = [
        single.flip([axis + 1 for axis in (0, 1) if flip[axis]])
        for single, flip in zip(image, flips, strict=True)
    ]
    return torch.stack(mirrored)
