"""ControlNet: conditions the latent diffusion U-Net on a low-resolution image.

    image [B, 3, q, q] -lift-> control [B, 3, P, P] -ControlNet-> residuals -> U-Net -> x_0

diffusers' `ControlNetModel` (Zhang et al. 2023): a trainable copy of the U-Net's encoder whose
outputs pass zero-initialized convolutions. As a super-resolution network it is a baseline of
ZoomLDM (section 4.4, Table 3). The image is first upsampled to the patch's side, so one network
serves every factor.
"""

from __future__ import annotations

from diffusers import ControlNetModel
from jaxtyping import Float
from torch import Tensor

from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models.unet import UNet
from raylarge.resample import upsample

_WIDTHS = (16, 32, 96, 256)  # the published conditioning network, of factor 8


def build(unet: UNet, factor: int) -> ControlNetModel:
    """Build a ControlNet from a copy of the U-Net's encoder; its initial output is zero.

    Args:
        factor: of the autoencoder (image side / latent side); each doubling is one convolution
            of stride 2 in the conditioning network.

    Raises:
        UserError: a factor that is no power of two.
    """
    if factor < 1 or factor & (factor - 1):
        raise UserError(
            f"a ControlNet cannot follow an autoencoder of factor {factor}; "
            f"use one whose factor is a power of two (4 or 8 as published)."
        )
    stages = factor.bit_length() - 1
    widths = [*_WIDTHS, *[_WIDTHS[-1]] * stages][: stages + 1]
    controlnet: ControlNetModel = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=tuple(widths), conditioning_channels=3
    )
    return controlnet


def lift(image: Float[Tensor, "B 3 q q"], side: int) -> Float[Tensor, "B 3 {side} {side}"]:
    """Upsample a low-resolution image in [-1, 1] to the patch's side (bicubic U), in px.

    Raises:
        UserError: the side is no multiple of the image's.
    """
    q = image.shape[-1]
    if side % q:
        raise UserError(
            f"a control of {q} px cannot be lifted to a patch of {side} px; "
            f"give an image whose side divides {side}."
        )
    return upsample(image, side // q)


class Controlled:
    """A denoiser: the U-Net with a ControlNet and fixed controls.

    Args:
        control: lifted images, one for each sample of a batch. A batch of a multiple of them, as
            guidance needs ([cond, uncond]), repeats them in that order.
    """

    def __init__(
        self,
        unet: UNet,
        controlnet: ControlNetModel,
        schedule: Schedule,
        control: Float[Tensor, "N 3 P P"],
    ) -> None:
        self.unet, self.controlnet, self.schedule = unet, controlnet, schedule
        self.control = control

    def __call__(
        self, x_t: Float[Tensor, "B c h w"], t: int, context: Float[Tensor, "B n D"]
    ) -> Float[Tensor, "B c h w"]:
        """Return the estimate of x_0.

        Raises:
            UserError: a control of another size than the latent's in pixels, or a batch that is
                no multiple of the controls.
        """
        z = x_t.to(self.unet.dtype)
        down, middle = self.controlnet(
            z, t, context, controlnet_cond=self._control(z), return_dict=False
        )
        output = self.unet(
            z,
            t,
            context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        )
        return self.schedule.x_0(x_t, output.to(x_t), t)

    def _control(self, x_t: Float[Tensor, "B c h w"]) -> Float[Tensor, "B 3 P P"]:
        """Return the controls repeated for the batch, on its device."""
        factor = 2 ** (len(self.controlnet.config.conditioning_embedding_out_channels) - 1)
        height, width = (factor * side for side in x_t.shape[2:])
        if tuple(self.control.shape[2:]) != (height, width):
            raise UserError(
                f"the control is {self.control.shape[2]}x{self.control.shape[3]} px, the latent "
                f"needs {height}x{width} px; lift the image to that side first."
            )
        copies, rest = divmod(len(x_t), len(self.control))
        if rest:
            raise UserError(
                f"{len(x_t)} latents cannot share {len(self.control)} controls; "
                f"give one control for each window, or one for all."
            )
        return self.control.to(x_t).repeat(copies, 1, 1, 1)
