"""Names of Latent Diffusion's checkpoints, and the sizes that their tensors give away.

The U-Net's EMA is stored under names without dots (`model_ema.diffusion_modelinput_blocks41…`),
so they are looked up from every dotted name that a U-Net can have, never taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product

from torch import Tensor

from raylarge.errors import UserError
from raylarge.models.unet import UNetConfig
from raylarge.models.weights import refuse

Named = Mapping[str, Tensor]


def absent(wanted: Sequence[str], flat: Named) -> None:
    """Refuse a checkpoint without what it must have.

    Raises:
        UserError: naming what was looked for and how the names there begin.
    """
    there = ", ".join(list(flat)[:3]) or "nothing"
    raise UserError(
        f"missing {' or '.join(dict.fromkeys(wanted))}; the {len(flat)} tensors begin with {there}."
    )


def need(named: Named, name: str) -> Tensor:
    """A tensor that must be there.

    Raises:
        UserError: it is not.
    """
    if name not in named:
        absent([name], named)
    return named[name]


def count(named: Named, pattern: str) -> int:
    """How many consecutive indices, from 0, fill a pattern of a name."""
    index = 0
    while pattern.format(index) in named:
        index += 1
    return index


def averaged(flat: Named) -> dict[str, Tensor]:
    """The EMA's tensors by their dotted names, by way of every name that a U-Net can have."""
    for prefix in ("model_ema.diffusion_model", "model_ema.", "diffusion_model"):
        found = {
            name: flat[prefix + name.replace(".", "")]
            for name in _unet_names()
            if prefix + name.replace(".", "") in flat
        }
        if found:
            stray = {k for k in flat if k.startswith(prefix) and "block" in k}
            known = {prefix + name.replace(".", "") for name in found}
            refuse("the EMA of the U-Net", unexpected=sorted(stray - known))
            return found
    return {}


@cache
def _unet_names() -> list[str]:
    """The grammar of Latent Diffusion's U-Net names; without dots each stays unique."""
    attention = [f"attn{a}.{to}" for a, to in product((1, 2), ("to_q", "to_k", "to_v", "to_out.0"))]
    inner = [*attention, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    residual = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    module = [*residual, "skip_connection", "op", "conv", "norm", "proj_in", "proj_out"]
    module += [f"transformer_blocks.{depth}.{name}" for depth, name in product(range(10), inner)]
    places = [f"middle_block.{j}" for j in range(3)]
    places += [
        f"{side}_blocks.{i}.{j}" for side, i, j in product(("input", "output"), range(40), range(3))
    ]
    stems = ["input_blocks.0.0", "time_embed.0", "time_embed.2", "out.0", "out.2"]
    stems += [f"{place}.{name}" for place, name in product(places, module)]
    return [f"{stem}.{kind}" for stem, kind in product(stems, ("weight", "bias"))]


def unet_sizes(named: Named, heads: int) -> tuple[UNetConfig, tuple[int, int, int], int]:
    """Configuration, latent shape and context width of a U-Net's tensors."""
    channels: list[int] = []
    attention: list[bool] = []
    layers, block, down = 0, 1, True
    while any(f"input_blocks.{block}.0.{x}.weight" in named for x in ("op", "in_layers.2")):
        if f"input_blocks.{block}.0.op.weight" in named:
            down = True
        else:
            if down:
                channels.append(named[f"input_blocks.{block}.0.in_layers.2.weight"].shape[0])
                attention.append(f"input_blocks.{block}.1.norm.weight" in named)
            down = False
            layers += len(channels) == 1
        block += 1
    context = need(named, "middle_block.1.transformer_blocks.0.attn2.to_k.weight").shape[1]
    config = UNetConfig(tuple(channels), tuple(attention), layers, heads)
    return config, (need(named, "out.2.weight").shape[0], 64, 64), context


def vae_sizes(named: Named) -> tuple[tuple[int, ...], int]:
    """Widths of the levels and residual blocks per level of an autoencoder's tensors."""
    refuse("a plain autoencoder", unsupported=[name for name in named if ".attn." in name])
    levels = count(named, "encoder.down.{}.block.0.conv1.weight")
    layers = count(named, "encoder.down.0.block.{}.conv1.weight")
    widths = [named[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    return tuple(widths), layers
