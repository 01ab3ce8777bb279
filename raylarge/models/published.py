"""The papers' published checkpoints as raylarge's networks.

    flat names, {"state_dict": …} or the CDM's {"model", "ema", …}   ->   modules, in float32

Every size but the number of heads is read off the tensors. Of raw and EMA weights (whose names
have lost all their dots) the EMA is taken, as the published samplers do. A name that is missing
or unknown is an error. Names: ZoomLDM, Latent Diffusion, Graikos et al., DiT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models.autoencoder import Autoencoder, kl, vq
from raylarge.models.cdm import CDM
from raylarge.models.embedder import VectorEmbedder
from raylarge.models.ldm_names import absent, averaged, count, need, unet_sizes, vae_sizes
from raylarge.models.summarizer import Summarizer
from raylarge.models.unet import UNet, build
from raylarge.models.weights import fill, refuse

State = Mapping[str, Any]


def unet_from_published(state: State, heads: int = 1, ema: bool = True) -> UNet:
    """The denoising U-Net, called as (x_t, t, context).

    Args:
        state: names under `model.diffusion_model.`, `diffusion_model.` or bare; or those of
            `model_ema.`.
        heads: attention heads; the published networks have one.
        ema: take the average where there is one.

    Raises:
        UserError: no U-Net in it, or names missing or unknown.
    """
    named = _unet_tensors(_flat(state), ema)
    with torch.device("meta"):
        unet = build(*unet_sizes(named, heads))
    converted = _unet_converter()(
        {f"model.diffusion_model.{k}": v for k, v in named.items()}, dict(unet.config)
    )
    _all_used(named, converted, "a U-Net")
    return fill(unet, converted, "a U-Net")


def vq_from_published(state: State) -> Autoencoder:
    """The VQ autoencoder: `.encode(image)` before quantisation, `.decode(latent)` quantises.

    Args:
        state: names under `first_stage_model.` or bare; a discriminator's are ignored.

    Raises:
        UserError: no VQ autoencoder in it, or names missing or unknown.
    """
    named = _section(state, ("first_stage_model.", ""), "quantize.embedding.weight", _VAE)
    channels, layers = vae_sizes(named)
    codes, width = named["quantize.embedding.weight"].shape
    with torch.device("meta"):
        network = vq(channels, layers, (codes, width), named["decoder.conv_in.weight"].shape[1])
    return Autoencoder(_vae(named, network, "a VQ autoencoder"))


def kl_from_published(state: State, scale: float | None = None) -> Autoencoder:
    """A KL autoencoder of Latent Diffusion; its mean, scaled, is the latent.

    Args:
        state: names under `first_stage_model.` or bare.
        scale: what the diffusion models multiply latents by; read from the checkpoint's
            `scale_factor` if left out, else 0.18215.

    Raises:
        UserError: no KL autoencoder in it, or names missing or unknown.
    """
    stored = float(_flat(state).get("scale_factor", 0.18215))
    named = _section(state, ("first_stage_model.", ""), "quant_conv.weight", _VAE)
    if "quantize.embedding.weight" in named:
        raise UserError("this autoencoder has a codebook: it is a VQ, not a KL one.")
    channels, layers = vae_sizes(named)
    latent = named["post_quant_conv.weight"].shape[0]
    with torch.device("meta"):
        network: AutoencoderKL = kl(channels, layers, latent, stored if scale is None else scale)
    return Autoencoder(_vae(named, network, "a KL autoencoder"))


def autoencoder_from_published(state: State) -> Autoencoder:
    """The autoencoder of a checkpoint, VQ or KL."""
    flat = _flat(state)
    has_codes = any(name.endswith("quantize.embedding.weight") for name in flat)
    return vq_from_published(flat) if has_codes else kl_from_published(flat)


def tiny_from_published(encoder: State, decoder: State) -> Autoencoder:
    """TAESD or TAESD3, from its two files of `nn.Sequential` names.

    Raises:
        UserError: names missing or unknown.
    """
    latent = encoder["14.weight"].shape[0] if "14.weight" in encoder else 4
    with torch.device("meta"):
        network = AutoencoderTiny(latent_channels=latent)
    named = {f"encoder.layers.{name}": tensor for name, tensor in encoder.items()}
    for name, tensor in decoder.items():  # the original decoder begins with a clamp, layer 0
        layer, rest = name.split(".", 1)
        named[f"decoder.layers.{int(layer) - 1}.{rest}"] = tensor
    return Autoencoder(fill(network, named, "a tiny autoencoder"))


def summarizer_from_published(state: State, heads: int = 8, raw: bool = False) -> Summarizer:
    """The Summarizer, called as (grid [B, C, h, w], scale ids [B]).

    Args:
        state: names under `cond_stage_model.` or bare.
        heads: attention heads.
        raw: normalise each embedding inside; the published module is given normalised ones.

    Raises:
        UserError: no Summarizer in it, or names missing or unknown.
    """
    named = _section(state, ("cond_stage_model.", ""), "dim_reduce.weight", _SUMMARIZER)
    width, channels = named["dim_reduce.weight"].shape
    layers = count(named, "encoder.layers.encoder_layer_{}.ln_1.weight")
    scales = need(named, "mag_embedding.weight").shape[0]
    hidden = need(named, "encoder.layers.encoder_layer_0.mlp.0.weight").shape[0]
    with torch.device("meta"):
        summarizer = Summarizer(channels, width, layers, heads, scales, raw, hidden)
    renamed = {
        name.replace("encoder.layers.encoder_layer_", "encoder_layers.")
        .replace("encoder.", "")
        .replace("mlp.3.", "mlp.2."): tensor
        for name, tensor in named.items()
    }
    return fill(summarizer, renamed, "a Summarizer")


def embedder_from_published(state: State) -> VectorEmbedder:
    """Graikos et al.'s conditioning, of one token or two.

    Args:
        state: `patch_fc.*` and perhaps `region_fc.*`, under `cond_stage_model.` or bare.

    Raises:
        UserError: no such layers in it.
    """
    named = _section(state, ("cond_stage_model.", ""), "patch_fc.weight", ("patch_fc", "region_fc"))
    width, channels = named["patch_fc.weight"].shape
    region = named["region_fc.weight"].shape[1] if "region_fc.weight" in named else 0
    with torch.device("meta"):
        embedder = VectorEmbedder(channels, region, width)
    return fill(embedder, named, "an embedder")


def has_embedder(state: State) -> bool:
    """Whether a checkpoint is conditioned as Graikos et al. do, by vectors."""
    return any(name.endswith("patch_fc.weight") for name in _flat(state))


def cdm_from_published(state: State, heads: int = 12) -> CDM:
    """The CDM, called as (x_t [B, C, N], t [B], scale ids [B]).

    Args:
        state: DiT's names, bare, or the training's {"model", "ema", …}, of which the EMA.
        heads: attention heads.

    Raises:
        UserError: no DiT in it, or names missing or unknown.
    """
    named = _section(state, ("module.", ""), "x_embedder.weight", None)
    width, channels = named["x_embedder.weight"].shape
    scales = need(named, "y_embedder.embedding_table.weight").shape[0]
    outputs = need(named, "final_layer.linear.weight").shape[0]
    with torch.device("meta"):
        cdm = CDM(
            channels,
            tokens=need(named, "pos_embed").shape[1],
            width=width,
            depth=count(named, "blocks.{}.attn.qkv.weight"),
            heads=heads,
            scales=scales,
            learn_sigma=outputs == 2 * channels,
            hidden=need(named, "blocks.0.mlp.fc1.weight").shape[0],
        )
    renamed = {
        name.replace("t_embedder.mlp.", "t_embedder.").replace(".embedding_table.", "."): tensor
        for name, tensor in named.items()
    }
    return fill(cdm, renamed, "a CDM")


def schedule_from_published(state: State) -> Schedule:
    """The schedule of a checkpoint's `betas`; the published one where it stores none.

    Raises:
        UserError: betas that are not `scaled_linear`.
    """
    betas = _flat(state).get("betas")
    if betas is None:
        return Schedule()
    ends = (float(betas[0]), float(betas[-1]))
    schedule = Schedule("scaled_linear", len(betas), round(ends[0], 6), round(ends[1], 6))
    if (schedule.betas - betas.double()).abs().max() > 1e-6:
        raise UserError(
            f"the checkpoint's betas ({ends[0]:.4g} to {ends[1]:.4g}) are not scaled_linear."
        )
    return schedule


_VAE = ("encoder", "decoder", "quantize", "quant_conv", "post_quant_conv")
_SUMMARIZER = ("pad_token", "mag_embedding", "dim_reduce", "encoder", "final_proj", "layer_norm")


def _flat(state: State) -> dict[str, Tensor]:
    """The tensors by name, out of the dictionaries that training codes wrap them in."""
    for wrapper in ("state_dict", "ema", "model"):
        inner = state.get(wrapper)
        if isinstance(inner, Mapping):
            return _flat(inner)
    return {name: torch.as_tensor(value) for name, value in state.items() if _is_array(value)}


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def _section(
    state: State, prefixes: Sequence[str], marker: str, heads: Sequence[str] | None
) -> dict[str, Tensor]:
    """One network's tensors without their prefix, known by a name that it must have.

    Args:
        heads: first words of the network's names; others under the prefix are left alone.
    """
    flat = _flat(state)
    for prefix in prefixes:
        if prefix + marker in flat:
            named = {k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)}
            return {k: v for k, v in named.items() if not heads or k.split(".")[0] in heads}
    absent([prefix + marker for prefix in prefixes], flat)
    raise AssertionError


def _unet_tensors(flat: Mapping[str, Tensor], ema: bool) -> dict[str, Tensor]:
    """The U-Net's tensors under their bare names, averaged where there is a choice."""
    found = averaged(flat) if ema else {}
    if found:
        return found
    prefixes = ("model.diffusion_model.", "diffusion_model.", "")
    heads = ("time_embed", "input_blocks", "middle_block", "output_blocks", "out", "label_emb")
    return _section(flat, prefixes, "input_blocks.0.0.weight", heads)


def _unet_converter() -> Any:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return convert_ldm_unet_checkpoint


def _vae(named: Mapping[str, Tensor], network: Any, source: str) -> nn.Module:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    converted = convert_ldm_vae_checkpoint(dict(named), dict(network.config))
    if "quantize.embedding.weight" in named:  # the one tensor that diffusers leaves behind
        converted["quantize.embedding.weight"] = named["quantize.embedding.weight"]
    _all_used(named, converted, source)
    return fill(network, converted, source)


def _all_used(named: Mapping[str, Tensor], converted: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors that diffusers' converter dropped without a word."""
    if len(named) > len(converted):
        kept = {tensor.data_ptr() for tensor in converted.values()}
        dropped = [name for name, tensor in named.items() if tensor.data_ptr() not in kept]
        refuse(source, unexpected=dropped)
