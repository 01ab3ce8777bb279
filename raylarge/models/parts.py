"""A bundle's files: its index, its parts, its format's history.

    model_index.json: {"vae": ["diffusers", "VQModel"], …, "raylarge": {facts, "format": 2}}

Weights are safetensors only, on a disk or in S3, in one file or in several; a part is loaded
whole or not at all. A bundle of an older format is brought up to date while it is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, VQModel
from safetensors.torch import load as tensors_of
from safetensors.torch import load_file
from torch import Tensor, nn

from raylarge import storage
from raylarge.errors import UserError
from raylarge.models import hub, weights
from raylarge.models.cdm import CDM
from raylarge.models.embedder import VectorEmbedder
from raylarge.models.light import LightAutoencoder
from raylarge.models.prior import GridPrior
from raylarge.models.summarizer import ConvSummarizer, Summarizer
from raylarge.models.unet import UNet

FORMAT = 2
PARTS: dict[str, dict[str, Any]] = {
    "vae": {
        "LightAutoencoder": LightAutoencoder,
        "VQModel": VQModel,
        "AutoencoderKL": AutoencoderKL,
        "AutoencoderTiny": AutoencoderTiny,
    },
    "unet": {"UNet2DConditionModel": UNet},
    "summarizer": {
        "Summarizer": Summarizer,
        "ConvSummarizer": ConvSummarizer,
        "VectorEmbedder": VectorEmbedder,
    },
    "cdm": {"CDM": CDM},
    "prior": {"GridPrior": GridPrior},
    "controlnet": {"ControlNetModel": ControlNetModel},
}
"""Which classes a part may be of, by the name that the index gives them."""

WEIGHTS = "diffusion_pytorch_model.safetensors"


def there(folder: str) -> bool:
    """Whether a bundle, whole or begun, stands at a path or URL."""
    return storage.exists(storage.join(folder, "model_index.json"))


def local(folder: str) -> str:
    """A folder or URL as it is; a hub id `owner/name` as the folder of its download.

    Raises:
        UserError: the hub cannot be reached, or has no such bundle.
    """
    if there(folder) or not re.fullmatch(r"[\w.-]+/[\w.-]+", folder):
        return folder
    told = "there is no such folder either: copy the bundle to a disk and give its path."
    patterns = ("*.json", "*.safetensors")
    return str(hub.fetch(folder, ("model_index.json",), told, beside=patterns).parent)


def index(folder: str) -> dict[str, Any]:
    """A bundle's index, of today's format.

    Raises:
        UserError: no bundle at the path, or one of a newer format.
    """
    if not there(folder):
        raise UserError(
            f"there is no bundle at {folder} (no model_index.json); give the folder that "
            f"python jobs/train.py wrote as out=, or run make demo for a small one."
        )
    found = dict(storage.read_json(storage.join(folder, "model_index.json")))
    version = int(found.get("raylarge", {}).get("format", 0))
    if not 1 <= version <= FORMAT:
        raise UserError(
            f"the bundle {folder} has format {version}, this raylarge reads 1 to {FORMAT}; "
            f"install the version of raylarge that wrote it, or a newer one."
        )
    return found


def write_index(folder: str, entries: dict[str, Any], known: dict[str, Any]) -> None:
    """Write the list of parts and the facts, atomically."""
    storage.write_json(storage.join(folder, "model_index.json"), {**entries, "raylarge": {**known}})


def entry(part: Any) -> list[str]:
    """How the index names a part's class: diffusers' own where diffusers can load it."""
    if isinstance(part, UNet):
        return ["diffusers", "UNet2DConditionModel"]
    library = "diffusers" if type(part).__module__.startswith("diffusers") else "raylarge"
    return [library, type(part).__name__]


def config(folder: str, name: str) -> dict[str, Any]:
    """A part's config, of today's format."""
    values = dict(storage.read_json(storage.join(folder, name, "config.json")))
    for version in range(int(index(folder)["raylarge"]["format"]), FORMAT):
        values = _MIGRATIONS[version](name, values)
    return values


def part(folder: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A part with its weights, in evaluation mode, on the CPU.

    Raises:
        UserError: a class that no bundle holds, or tensors that are missing or unknown.
    """
    kind = index(folder)[name][1]
    if kind not in PARTS[name]:
        raise UserError(f"{folder}: {name} is a {kind}; expected {', '.join(PARTS[name])}.")
    with torch.device("meta"):
        module = PARTS[name][kind].from_config(config(folder, name))
    filled = weights.fill(module, _tensors(folder, name), f"{folder}: {name}")
    return nn.Module.to(filled, dtype)  # diffusers' own `to` warns of what does not concern it


def digest(folder: str, names: tuple[str, ...] = tuple(PARTS)) -> str:
    """A short name for the weights and configurations of some parts, wherever they lie."""
    folder = local(folder)
    known = index(folder)["raylarge"].get("digests", {})
    return storage.digest(
        *((known.get(name) or computed_digest(folder, (name,))).encode() for name in names)
    )


def computed_digest(folder: str, names: tuple[str, ...]) -> str:
    """The same name from the files themselves."""
    paths = [path for name in names for path in storage.listing(f"{folder}/{name}/*")]
    return storage.digest(*map(_content, paths))


def _content(path: str) -> bytes:
    """A file without what tells where it was loaded from."""
    if not path.endswith(".json"):
        return storage.read_bytes(path)
    values = storage.read_json(path)
    values.pop("_name_or_path", None)
    return json.dumps(values, sort_keys=True).encode()


def _tensors(folder: str, name: str) -> dict[str, Tensor]:
    several = storage.join(folder, name, f"{WEIGHTS}.index.json")
    names = [WEIGHTS]
    if storage.exists(several):
        names = sorted(set(storage.read_json(several)["weight_map"].values()))
    found: dict[str, Tensor] = {}
    for file in names:
        path = storage.join(folder, name, file)
        if storage.is_local(path):
            if not storage.exists(path):
                raise UserError(f"{path} does not exist: the bundle is incomplete; copy it whole.")
            found |= load_file(path.removeprefix("file://"))
        else:
            found |= tensors_of(storage.read_bytes(path))
    return found


def _from_1(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Format 1 knew no learned variance."""
    return {"learn_sigma": False, **values} if name == "cdm" else values


_MIGRATIONS: dict[int, Callable[[str, dict[str, Any]], dict[str, Any]]] = {1: _from_1}
