"""Names of Latent Diffusion's checkpoints, and network sizes derived from tensor shapes.

    tensors -> sizes -> diffusers' network -> its names as published -> compared with the tensors

The U-Net's EMA is stored under names without dots (`model_ema.diffusion_modelinput_blocks41…`).
They are looked up by all dotted names that a U-Net can have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NoReturn

from torch import Tensor

from raylarge.errors import UserError
from raylarge.models.unet import UNetConfig
from raylarge.models.weights import refuse

Named = Mapping[str, Tensor]
GROUPS = 32
"""Groups of every group norm of these networks."""


def refuse_missing(names: Sequence[str], flat: Named) -> NoReturn:
    """Raise for a checkpoint without the named tensors.

    Raises:
        UserError: with these names and the first names of the checkpoint.
    """
    first = ", ".join(list(flat)[:3]) or "nothing"
    raise UserError(
        f"missing {' or '.join(dict.fromkeys(names))}; the {len(flat)} tensors begin with {first}."
    )


def refuse_unsupported(feature: str) -> NoReturn:
    """Raise for a network with an unsupported feature.

    Raises:
        UserError: always.
    """
    raise UserError(f"not supported: {feature}; give a checkpoint of another configuration.")


def require_tensor(named: Named, name: str, dimensions: int) -> Tensor:
    """Return a tensor from whose shape a size is read.

    Raises:
        UserError: it is missing, empty, or has another number of dimensions.
    """
    if name not in named:
        refuse_missing([name], named)
    tensor = named[name]
    if tensor.ndim != dimensions or not tensor.numel():
        raise UserError(
            f"{name} has the shape {list(tensor.shape)}; expected {dimensions} dimensions, "
            f"none of them 0; check the file."
        )
    return tensor


def has_prefix(named: Named, start: str) -> bool:
    """Return whether any name begins with `start`."""
    return any(name.startswith(start) for name in named)


def count_indices(named: Named, start: str) -> int:
    """Return one more than the largest index that follows `start` in names; 0 without any.

    Indices beyond the number of tensors are ignored; such names are reported as unexpected.
    """
    following = (name[len(start) :].split(".")[0] for name in named if name.startswith(start))
    indices = (int(index) for index in following if index.isdecimal())
    return max((index + 1 for index in indices if index < len(named)), default=0)


def check_heads(heads: int, widths: Sequence[int], whose: str) -> None:
    """Check that the number of attention heads divides the widths.

    Raises:
        UserError: it does not.
    """
    if heads < 1 or any(width % heads for width in widths):
        listed = ", ".join(str(width) for width in dict.fromkeys(widths))
        raise UserError(
            f"{heads} attention heads do not divide {whose} of width {listed}; give a divisor "
            f"as heads."
        )


def ema_tensors(flat: Named) -> dict[str, Tensor]:
    """Return the tensors of the EMA by their dotted names; empty if there is none.

    Raises:
        UserError: names that no U-Net has.
    """
    for prefix in ("model_ema.diffusion_model", "model_ema.", "diffusion_model"):
        tensors = {
            name: flat[prefix + name.replace(".", "")]
            for name in _unet_names()
            if prefix + name.replace(".", "") in flat
        }
        if tensors:
            expected = {prefix + name.replace(".", "") for name in tensors}
            expected |= {"model_ema.decay", "model_ema.num_updates"}
            root = prefix.split(".")[0]
            others = {name for name in flat if name.startswith(root)} - expected
            unexpected = [name for name in others if not name.startswith("diffusion_model.")]
            refuse("the EMA of the U-Net", unexpected=sorted(unexpected))
            return tensors
    return {}


@cache
def _unet_names() -> list[str]:
    """Return all possible names of Latent Diffusion's U-Net; they are unique without dots, too."""
    attention = [f"attn{a}.{to}" for a, to in product((1, 2), ("to_q", "to_k", "to_v", "to_out.0"))]
    inner = [*attention, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    residual = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    module = [*residual, "skip_connection", "op", "conv", "norm", "proj_in", "proj_out"]
    module += [f"transformer_blocks.{depth}.{name}" for depth, name in product(range(12), inner)]
    places = [f"middle_block.{j}" for j in range(3)]
    places += [
        f"{side}_blocks.{i}.{j}" for side, i, j in product(("input", "output"), range(64), range(3))
    ]
    stems = ["input_blocks.0.0", "time_embed.0", "time_embed.2", "out.0", "out.2"]
    stems += [f"{place}.{name}" for place, name in product(places, module)]
    return [f"{stem}.{kind}" for stem, kind in product(stems, ("weight", "bias"))]


@dataclass(frozen=True)
class UNetSizes:
    """Arguments of `unet.build` for the U-Net of some tensors.

    Attributes:
        config: widths, attention, layers and heads.
        latent: channels of the prediction, and the published sides.
        context: width of the context tokens.
        inputs: channels of x_t.
        depth: transformer blocks in each attention module.
    """

    config: UNetConfig
    latent: tuple[int, int, int]
    context: int
    inputs: int
    depth: int


def unet_sizes(named: Named, heads: int) -> UNetSizes:
    """Derive the sizes of a U-Net from its tensors.

    Raises:
        UserError: a missing tensor, an unsupported network, or heads that do not divide a width.
    """
    _refuse_other_unets(named)
    levels = _levels(named)
    layers = len(levels[0])
    if any(len(level) > layers for level in levels):
        each = ", ".join(str(len(level)) for level in levels)
        refuse_unsupported(f"levels of {each} residual blocks, where all must have as many")
    first = [1 + level * (layers + 1) for level in range(len(levels))]
    widths = [
        require_tensor(named, f"input_blocks.{i}.0.in_layers.2.weight", 4).shape[0] for i in first
    ]
    stem = require_tensor(named, "input_blocks.0.0.weight", 4)
    _check_widths(stem.shape[0], widths)
    attention = [any(has_prefix(named, f"input_blocks.{i}.1.") for i in level) for level in levels]
    attending = [width for width, on in zip(widths, attention, strict=True) if on]
    check_heads(heads, [*attending, widths[-1]], "a U-Net")
    context = require_tensor(
        named, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2
    ).shape[1]
    outputs = require_tensor(named, "out.2.weight", 4).shape[0]
    config = UNetConfig(tuple(widths), tuple(attention), layers, heads, GROUPS)
    return UNetSizes(config, (outputs, 64, 64), context, stem.shape[1], _depth(named, levels))


def _refuse_other_unets(named: Named) -> None:
    kinds = {
        r"label_emb\.": "class embeddings of a U-Net",
        r"\.qkv\.": "attention without a context",
    }
    for pattern, kind in kinds.items():
        if name := next((name for name in named if re.search(pattern, name)), ""):
            refuse_unsupported(f"{kind} ({name})")
    projection = named.get("middle_block.1.proj_in.weight")
    if projection is not None and projection.ndim == 2:
        refuse_unsupported("linear layers around the transformers (middle_block.1.proj_in.weight)")


def _levels(named: Named) -> list[list[int]]:
    """Return the indices of the residual input blocks of each level; an `op` ends a level."""
    levels: list[list[int]] = [[]]
    for block in range(1, count_indices(named, "input_blocks.")):
        if not has_prefix(named, f"input_blocks.{block}."):
            ends = ("op", "in_layers.2")
            refuse_missing([f"input_blocks.{block}.0.{end}.weight" for end in ends], named)
        if has_prefix(named, f"input_blocks.{block}.0.op."):
            levels.append([])
        else:
            levels[-1].append(block)
    return levels


def _depth(named: Named, levels: list[list[int]]) -> int:
    """Return the number of transformer blocks in each attention module."""
    places = [f"input_blocks.{i}.1." for level in levels for i in level]
    depths = {
        count_indices(named, f"{place}transformer_blocks.")
        for place in ["middle_block.1.", *(place for place in places if has_prefix(named, place))]
    }
    if len(depths) > 1:
        refuse_unsupported(
            f"{' and '.join(map(str, sorted(depths)))} transformer blocks in one U-Net"
        )
    return depths.pop()


def _check_widths(stem: int, widths: Sequence[int]) -> None:
    if stem != widths[0]:
        refuse_unsupported(f"a first level {widths[0]} wide after a first layer of {stem} channels")
    if odd := [width for width in widths if width % GROUPS]:
        refuse_unsupported(f"{odd[0]} channels, where every width must be a multiple of {GROUPS}")


@dataclass(frozen=True)
class VAESizes:
    """Widths of an autoencoder's levels, residual blocks per level, and channels of images."""

    widths: tuple[int, ...]
    layers: int
    inputs: int
    outputs: int


def vae_sizes(named: Named) -> VAESizes:
    """Derive the sizes of an autoencoder from its tensors.

    Raises:
        UserError: a missing tensor, or an unsupported network.
    """
    if attention := next((name for name in named if ".attn." in name), ""):
        refuse_unsupported(f"attention within the levels of an autoencoder ({attention})")
    levels = range(max(1, count_indices(named, "encoder.down.")))
    widths = [
        require_tensor(named, f"encoder.down.{i}.block.0.conv1.weight", 4).shape[0] for i in levels
    ]
    stem = require_tensor(named, "encoder.conv_in.weight", 4)
    _check_widths(stem.shape[0], widths)
    layers = count_indices(named, "encoder.down.0.block.")
    outputs = require_tensor(named, "decoder.conv_out.weight", 4).shape[0]
    return VAESizes(tuple(widths), layers, stem.shape[1], outputs)


def unet_name(name: str, config: UNetConfig) -> str:
    """Return the published name of a tensor of diffusers' U-Net."""
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name)
    if middle:
        number = 2 * int(middle[2]) if middle[1] == "resnets" else 1
        return f"middle_block.{number}.{_inner(middle[1], middle[3])}"
    level = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not level:
        return _renamed(name, _UNET_ENDS)
    down, kind = level[1] == "down", level[3]
    first = int(level[2]) * (config.layers + 1) + down  # input block 0 is the first layer
    if kind == "downsamplers":
        return f"input_blocks.{first + config.layers}.0.op.{level[5].removeprefix('conv.')}"
    if kind == "upsamplers":
        after = 1 + config.attention[-1 - int(level[2])]
        return f"output_blocks.{first + config.layers}.{after}.{level[5]}"
    place = f"{'input' if down else 'output'}_blocks.{first + int(level[4])}"
    return f"{place}.{int(kind == 'attentions')}.{_inner(kind, level[5])}"


def _inner(kind: str, name: str) -> str:
    return _renamed(name, _RESIDUAL) if kind == "resnets" else name


def vae_name(name: str, levels: int) -> str:
    """Return the published name of a tensor of diffusers' VQ or KL autoencoder."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    up = re.search(r"up_blocks\.(\d+)\.", name)
    if up:
        name = name.replace(up[0], f"up.{levels - 1 - int(up[1])}.")
    name = name.replace(".resnets.", ".block.").replace(".upsamplers.0", ".upsample")
    middle = re.search(r"mid_block\.block\.(\d)", name)
    if middle:
        name = name.replace(middle[0], f"mid.block_{int(middle[1]) + 1}")
    return _renamed(name, _VAE)


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.attentions.0.": "mid.attn_1.",
    "attn_1.group_norm": "attn_1.norm",
    "attn_1.to_out.0": "attn_1.proj_out",
    "attn_1.to_": "attn_1.",
}
