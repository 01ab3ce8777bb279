"""Import networks from the papers' published checkpoints.

    flat names, {"state_dict": …} or the CDM's {"model", "ema", …}   ->   modules, in float32

All sizes except the number of heads are derived from the tensors. EMA weights are preferred to raw
ones, as in the published samplers. `…_from_published` loads a network; `checked_…` only checks
names and shapes and reads no values. Missing and unexpected names are errors and reported as in
the file. Names: ZoomLDM, Latent Diffusion, Graikos et al., DiT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from torch import Tensor

from raylarge.errors import UserError
from raylarge.models.autoencoder import Autoencoder, kl, vq
from raylarge.models.cdm import CDM
from raylarge.models.embedder import VectorEmbedder
from raylarge.models.published_names import (
    check_heads,
    count_indices,
    ema_tensors,
    has_prefix,
    refuse_missing,
    refuse_unsupported,
    require_tensor,
    unet_name,
    unet_sizes,
    vae_name,
    vae_sizes,
)
from raylarge.models.published_schedule import rounding
from raylarge.models.state_dicts import preferred_tensors
from raylarge.models.summarizer import Summarizer
from raylarge.models.unet import UNet, build
from raylarge.models.weights import FittedNetwork, fit, without_prefixes

State = Mapping[Any, Any]
"""Content of a file: tensors or arrays by name, possibly nested, and anything else."""

_UNET = ("time_embed", "input_blocks", "middle_block", "output_blocks", "out", "label_emb")
_VAE = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
_SUMMARIZER = ("pad_token", "mag_embedding", "dim_reduce", "encoder", "final_proj", "layer_norm")
_EMBEDDER = ("patch_fc", "region_fc")


def unet_from_published(state: State, heads: int = 1, ema: bool = True) -> UNet:
    """Load the denoising U-Net, called as (x_t, t, context).

    Args:
        state: names under `model.diffusion_model.`, `diffusion_model.`, `model_ema.` or bare.
        heads: attention heads; the published networks have one.
        ema: use the averaged weights if there are any.

    Raises:
        UserError: no U-Net, names missing or unexpected, or heads that do not divide a width.
    """
    return checked_unet(state, heads, ema).load()


def checked_unet(state: State, heads: int = 1, ema: bool = True) -> FittedNetwork[UNet]:
    """Check the U-Net of `unet_from_published`; same errors."""
    flat = preferred_tensors(state)
    prefixes = ("model.diffusion_model.", "diffusion_model.", "")
    named = ema_tensors(flat) if ema else {}
    named = named or _section(flat, prefixes, "input_blocks.0.0.weight", _UNET)
    sizes = unet_sizes(named, heads)
    with torch.device("meta"):
        unet = build(sizes.config, sizes.latent, sizes.context, sizes.inputs, sizes.depth)
    return fit(unet, named, lambda name: unet_name(name, sizes.config), "a U-Net")


def vq_from_published(state: State) -> Autoencoder:
    """Load the VQ autoencoder: `.encode(image)` before quantisation, `.decode(latent)` quantises.

    Args:
        state: names under `first_stage_model.` or bare; a discriminator's are ignored.

    Raises:
        UserError: no VQ autoencoder, names missing or unexpected, or scaled latents.
    """
    return _wrapped(_checked_vq(preferred_tensors(state)))


def kl_from_published(state: State, scale: float | None = None) -> Autoencoder:
    """Load a KL autoencoder of Latent Diffusion; the latent is its mean, scaled.

    Args:
        state: names under `first_stage_model.` or bare.
        scale: factor of latents; by default the checkpoint's `scale_factor`, or 0.18215.

    Raises:
        UserError: no KL autoencoder, or names missing or unexpected.
    """
    return _wrapped(_checked_kl(preferred_tensors(state), scale))


def autoencoder_from_published(state: State) -> Autoencoder:
    """Load the autoencoder of a checkpoint, VQ or KL; errors as of those."""
    return _wrapped(checked_autoencoder(state))


def checked_autoencoder(state: State) -> FittedNetwork[Any]:
    """Check the autoencoder of a checkpoint; same errors."""
    flat = preferred_tensors(state)
    has_codes = has_prefix(flat, "first_stage_model.quantize.") or has_prefix(flat, "quantize.")
    return _checked_vq(flat) if has_codes else _checked_kl(flat)


def tiny_from_published(encoder: State, decoder: State) -> Autoencoder:
    """Load TAESD or TAESD3 from its two files of `nn.Sequential` names.

    Raises:
        UserError: names missing or unexpected.
    """
    first = _section(preferred_tensors(encoder), ("encoder.", ""), "0.weight")
    second = _section(preferred_tensors(decoder), ("decoder.", ""), "1.weight")
    named = {f"encoder.{name}": tensor for name, tensor in first.items()}
    named |= {f"decoder.{name}": tensor for name, tensor in second.items()}
    with torch.device("meta"):
        latent = require_tensor(named, "encoder.14.weight", 4).shape[0]
        network = AutoencoderTiny(latent_channels=latent)

    def stored(name: str) -> str:  # the original decoder begins with a clamp, layer 0
        side, _, layer, rest = name.split(".", 3)
        return f"{side}.{int(layer) + (side == 'decoder')}.{rest}"

    return _wrapped(fit(network, named, stored, "a tiny autoencoder"))


def summarizer_from_published(state: State, heads: int = 8, raw: bool = False) -> Summarizer:
    """Load the Summarizer, called as (grid [B, C, h, w], scale ids [B]).

    Args:
        state: names under `cond_stage_model.` or bare.
        heads: attention heads.
        raw: normalise embeddings inside; the published module expects normalised ones.

    Raises:
        UserError: no Summarizer, names missing or unexpected, or heads that do not divide.
    """
    return checked_summarizer(state, heads, raw).load()


def checked_summarizer(
    state: State, heads: int = 8, raw: bool = False
) -> FittedNetwork[Summarizer]:
    """Check the Summarizer of `summarizer_from_published`; same errors."""
    prefixes = ("cond_stage_model.", "")
    named = _section(preferred_tensors(state), prefixes, "dim_reduce.weight", _SUMMARIZER)
    width, channels = require_tensor(named, "dim_reduce.weight", 2).shape
    check_heads(heads, [width], "a Summarizer")
    layers = count_indices(named, "encoder.layers.encoder_layer_")
    scales = require_tensor(named, "mag_embedding.weight", 2).shape[0]
    hidden = require_tensor(named, "encoder.layers.encoder_layer_0.mlp.0.weight", 2).shape[0]
    with torch.device("meta"):
        summarizer = Summarizer(channels, width, layers, heads, scales, raw, hidden)

    def stored(name: str) -> str:
        name = name.replace("encoder_layers.", "layers.encoder_layer_").replace("mlp.2.", "mlp.3.")
        return f"encoder.{name}" if name.startswith(("layers.", "ln.", "pos_")) else name

    return fit(summarizer, named, stored, "a Summarizer")


def embedder_from_published(state: State) -> VectorEmbedder:
    """Load the conditioning of Graikos et al., of one token or two.

    Args:
        state: `patch_fc.*` and optionally `region_fc.*`, under `cond_stage_model.` or bare.

    Raises:
        UserError: no such layers.
    """
    return checked_embedder(state).load()


def checked_embedder(state: State) -> FittedNetwork[VectorEmbedder]:
    """Check the conditioning of `embedder_from_published`; same errors."""
    named = _section(
        preferred_tensors(state), ("cond_stage_model.", ""), "patch_fc.weight", _EMBEDDER
    )
    width, channels = require_tensor(named, "patch_fc.weight", 2).shape
    has_region = has_prefix(named, "region_fc.")
    region = require_tensor(named, "region_fc.weight", 2).shape[1] if has_region else 0
    with torch.device("meta"):
        embedder = VectorEmbedder(channels, region, width)
    return fit(embedder, named, str, "an embedder")


def has_embedder(state: State) -> bool:
    """Return whether a checkpoint has the conditioning of Graikos et al., by vectors."""
    flat = preferred_tensors(state)
    return has_prefix(flat, "cond_stage_model.patch_fc.") or has_prefix(flat, "patch_fc.")


def cdm_from_published(state: State, heads: int = 12) -> CDM:
    """Load the CDM, called as (x_t [B, C, N], t [B], scale ids [B]).

    Args:
        state: DiT's names, bare, or the training's {"model", "ema", …}, of which the EMA.
        heads: attention heads.

    Raises:
        UserError: no DiT, names missing or unexpected, or heads that do not divide.
    """
    return checked_cdm(state, heads).load()


def checked_cdm(state: State, heads: int = 12) -> FittedNetwork[CDM]:
    """Check the CDM of `cdm_from_published`; same errors."""
    named = _section(preferred_tensors(state), ("module.", ""), "x_embedder.weight")
    width, channels = require_tensor(named, "x_embedder.weight", 2).shape
    check_heads(heads, [width], "a CDM")
    outputs = require_tensor(named, "final_layer.linear.weight", 2).shape[0]
    with torch.device("meta"):
        cdm = CDM(
            channels,
            tokens=require_tensor(named, "pos_embed", 3).shape[1],
            width=width,
            depth=count_indices(named, "blocks."),
            heads=heads,
            scales=require_tensor(named, "y_embedder.embedding_table.weight", 2).shape[0],
            learn_sigma=outputs == 2 * channels,
            hidden=require_tensor(named, "blocks.0.mlp.fc1.weight", 2).shape[0],
        )

    def stored(name: str) -> str:
        name = name.replace("t_embedder.", "t_embedder.mlp.")
        return name.replace("y_embedder.", "y_embedder.embedding_table.")

    return fit(cdm, named, stored, "a CDM")


def _section(
    flat: Mapping[str, Tensor], prefixes: Sequence[str], marker: str, words: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors of one network without their prefix.

    Under a prefix all names are the network's, except the losses of an autoencoder's training.

    Args:
        marker: a name that the network must have.
        words: first words of the network's names, to select among bare names.
    """
    for prefix in prefixes:
        if prefix + marker in flat:
            named = {k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)}
            if prefix:
                return (
                    without_prefixes(named, ("loss.",)) if prefix == "first_stage_model." else named
                )
            return {k: v for k, v in named.items() if not words or k.split(".")[0] in words}
    refuse_missing([prefix + marker for prefix in prefixes], flat)


def _checked_vq(flat: dict[str, Tensor]) -> FittedNetwork[VQModel]:
    scale = _scale(flat, 1.0)
    if scale != 1:
        refuse_unsupported(
            f"a VQ autoencoder with scale_factor {scale:g}, where latents are not scaled"
        )
    named = _section(flat, ("first_stage_model.", ""), "quantize.embedding.weight", _VAE)
    sizes = vae_sizes(named)
    codes, width = require_tensor(named, "quantize.embedding.weight", 2).shape
    z = require_tensor(named, "decoder.conv_in.weight", 4).shape[1]
    with torch.device("meta"):
        network = vq(sizes.widths, sizes.layers, (codes, width), z)
        network = _for_images(network, sizes.inputs, sizes.outputs)
    return _checked_vae(network, named, "a VQ autoencoder")


def _checked_kl(
    flat: dict[str, Tensor], scale: float | None = None
) -> FittedNetwork[AutoencoderKL]:
    scale = _scale(flat, 0.18215) if scale is None else scale
    named = _section(flat, ("first_stage_model.", ""), "quant_conv.weight", _VAE)
    if "quantize.embedding.weight" in named:
        raise UserError("this autoencoder has a codebook: it is a VQ, not a KL one.")
    sizes = vae_sizes(named)
    z, latent = require_tensor(named, "post_quant_conv.weight", 4).shape[:2]
    if require_tensor(named, "encoder.conv_out.weight", 4).shape[0] == z:
        refuse_missing(
            ["quantize.embedding.weight"], named
        )  # no variances: a VQ without its codebook
    if z != latent:
        refuse_unsupported(
            f"a KL autoencoder whose {latent} latent channels become {z} in its decoder"
        )
    with torch.device("meta"):
        network = kl(sizes.widths, sizes.layers, latent, scale)
        network = _for_images(network, sizes.inputs, sizes.outputs)
    return _checked_vae(network, named, "a KL autoencoder")


def _scale(flat: Mapping[str, Tensor], default: float) -> float:
    """Return the checkpoint's `scale_factor`, or the default if it differs by rounding only."""
    stored = flat.get("scale_factor")
    if stored is None:
        return default
    if stored.numel() != 1 or not 0 < float(stored) < float("inf"):
        raise UserError(
            f"the checkpoint's scale_factor is {stored.tolist()}, not a number above 0."
        )
    is_default = abs(float(stored) - default) <= rounding(stored) * default
    return default if is_default else float(stored)


def _for_images(network: Any, inputs: int, outputs: int) -> Any:
    """Return the network for images of any number of channels."""
    channels = {"in_channels": inputs, "out_channels": outputs}
    return network if inputs == outputs == 3 else network.from_config(network.config, **channels)


def _checked_vae(network: Any, named: Mapping[str, Tensor], whose: str) -> FittedNetwork[Any]:
    stored = {  # the attention's 1 × 1 convolutions are linear layers in diffusers
        name: tensor.flatten(1) if ".attn_1." in name and _is_point(tensor) else tensor
        for name, tensor in named.items()
    }
    levels = len(network.config.block_out_channels)
    return fit(network, stored, lambda name: vae_name(name, levels), whose)


def _is_point(tensor: Tensor) -> bool:
    return tensor.ndim > 2 and tensor.shape[2:].numel() == 1


def _wrapped(checked: FittedNetwork[Any]) -> Autoencoder:
    return Autoencoder(checked.load()).eval()
