"""A bundle's files: its index, its parts, its format's history.

    model_index.json: {"vae": ["diffusers", "VQModel"], …, "raylarge": {facts, "format": 2}}

Weights are safetensors only, on a disk or in S3, in one file or in several; a part is loaded
whole or not at all. A bundle of an older format is brought up to date while it is read, and
for good before a part is added to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, VQModel
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import load_file
from torch import Tensor, nn

from raylarge import storage
from raylarge.errors import UserError
from raylarge.models import hub, weights
from raylarge.models.cdm import CDM
from raylarge.models.embedder import VectorEmbedder
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.models.prior import GridPrior
from raylarge.models.summarizer import ConvSummarizer, Summarizer
from raylarge.models.unet import UNet

FORMAT = 2
_CODECS: dict[str, Any] = {
    "LightAutoencoder": LightAutoencoder,
    "VQModel": VQModel,
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
}
PARTS: dict[str, dict[str, Any]] = {
    "vae": _CODECS,
    "vae_small": _CODECS,
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

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PATH_KEYS = ("data", "out", "logs")
"""Keys of a training that say where things lay, and nothing about its result."""
CONFIGS = {"scheduler": "scheduler_config.json"}
"""What stands beside the parts and has no weights."""


def exists(folder: str) -> bool:
    """Whether a bundle, whole or begun, stands at a path or URL."""
    return storage.exists(storage.join(folder, INDEX))


def resolve(folder: str) -> str:
    """A folder or URL as it is; a hub id `owner/name` as the folder of its download.

    Raises:
        UserError: the hub cannot be reached, or has no such bundle.
    """
    if exists(folder) or not hub.is_repo_id(folder) or storage.exists(folder):
        return folder
    told = "there is no such folder either: copy the bundle to a disk and give its path."
    patterns = ("*.json", "*.safetensors")
    return str(hub.fetch(folder, (INDEX,), told, beside=patterns, whole=_whole).parent)


def _whole(marker: Path) -> bool:
    """Whether every file that a downloaded index asks for has come."""
    folder = str(marker.parent)
    try:
        listed = read_index(folder)
        configs = [
            storage.join(folder, name, CONFIGS.get(name, "config.json"))
            for name in (*PARTS, *CONFIGS)
            if name in listed
        ]
        paths = [path for name in PARTS if name in listed for path in _files(folder, name)]
    except UserError:
        return False
    return all(storage.exists(path) for path in configs + paths)


def read_index(folder: str) -> dict[str, Any]:
    """A bundle's index, of today's format.

    Raises:
        UserError: no bundle at the path, one of a newer format, or a damaged index.
    """
    path = storage.join(folder, INDEX)
    if not exists(folder):
        raise UserError(
            f"there is no bundle at {folder} (no model_index.json); give the folder that "
            f"python jobs/train.py wrote as out=, or run make demo for a small one."
        )
    found = _mapping(path)
    known = found.get("raylarge", {})
    version = known.get("format", 0) if isinstance(known, dict) else known
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise UserError(
            f"{path}: the bundle has format {version}, this raylarge reads 1 to {FORMAT}; "
            f"install the version of raylarge that wrote it, or a newer one."
        )
    return found


def class_name(folder: str, name: str) -> str:
    """The class of a part that the index lists.

    Raises:
        UserError: none that a bundle holds.
    """
    found = read_index(folder)[name]
    named = found[1] if isinstance(found, list) and len(found) == 2 else found
    known = list(PARTS[name])
    if named not in known:
        path = storage.join(folder, INDEX)
        raise UserError(f"{path}: {name} is a {named}; expected {', '.join(known)}.")
    return str(named)


def write_index(folder: str, entries: dict[str, Any], known: dict[str, Any]) -> None:
    """Write the list of parts and the facts, without paths of this machine, atomically."""
    facts = {name: _without_places(value) for name, value in known.items()}
    storage.write_json(storage.join(folder, INDEX), {**entries, "raylarge": facts})


def _without_places(facts: Any) -> Any:
    """Return the facts of a training without where its data lay; others as they are."""
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        return facts
    kept = {key: value for key, value in facts["config"].items() if key not in PATH_KEYS}
    return {**facts, "config": storage.without_places(kept)}


def upgrade(folder: str, beside: Collection[str]) -> dict[str, Any]:
    """Bring a bundle's files to today's format, and give its index; {} where there is none.

    Configs are rewritten under the old format, which reads them as well, before the index says
    the new one: a killed run leaves a bundle that means the same, and can be run again.

    Args:
        folder: of the bundle, whole or begun.
        beside: parts that are about to be replaced, and are left alone.

    Raises:
        UserError: as `read_index`, or a damaged config.
    """
    found = read_index(folder) if exists(folder) else {}
    known = found.get("raylarge", {})
    if known.get("format", FORMAT) == FORMAT:
        return found
    digests = known.setdefault("digests", {})
    for name in [name for name in PARTS if name in found and name not in beside]:
        path, values = storage.join(folder, name, "config.json"), read_config(folder, name)
        if values != storage.read_json(path):
            if digests.pop(name, None):
                write_index(folder, found, known)
            storage.write_json(path, values)
            digests[name] = computed_digest(storage.join(folder, name))
    known["format"] = FORMAT
    write_index(folder, found, known)
    return found


def index_entry(part: Any) -> list[str]:
    """How the index names a part's class: diffusers' own where diffusers can load it."""
    if isinstance(part, UNet):
        return ["diffusers", "UNet2DConditionModel"]
    library = "diffusers" if type(part).__module__.startswith("diffusers") else "raylarge"
    return [library, type(part).__name__]


def read_config(folder: str, name: str) -> dict[str, Any]:
    """A part's config, of today's format.

    Raises:
        UserError: there is none, or a damaged one.
    """
    values = _mapping(storage.join(folder, name, "config.json"))
    values.pop("_name_or_path", None)  # where diffusers once loaded the part from
    for version in range(int(read_index(folder)["raylarge"]["format"]), FORMAT):
        values = _MIGRATIONS[version](name, values)
    return values


def load_part(folder: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A part with its weights, in evaluation mode, on the CPU; tiny autoencoders in float32.

    Raises:
        UserError: a class that no bundle holds, a damaged file, tensors that are missing or
            unknown, or values that are NaN, infinite, or too large for the precision.
    """
    made = PARTS[name][class_name(folder, name)]
    with torch.device("meta"):
        module = made.from_config(read_config(folder, name))
    filled = weights.fill(module, _tensors(folder, name), f"{folder}: {name}")
    dtype = torch.float32 if isinstance(filled, AutoencoderTiny) else dtype
    nn.Module.to(filled, dtype)  # diffusers' own `to` warns of what does not concern it
    if dtype == torch.float32:  # `fill` has looked at the values
        return filled
    large = [name for name, value in filled.state_dict().items() if not weights.is_finite(value)]
    if large:
        raise UserError(
            f"{folder}: {name}: values of {large[0]} are too large for "
            f"{str(dtype).removeprefix('torch.')}; choose dtype=bfloat16 or float32."
        )
    return filled


def digest(folder: str, names: tuple[str, ...] = ()) -> str:
    """A short name for weights and configurations, wherever they lie.

    Args:
        folder: of the bundle.
        names: the parts that are meant: the name of LATENTS is that of `("vae",)`. Left out it
            is the whole bundle, with its schedule and the side of its patches.

    Raises:
        UserError: no bundle, a part that it does not list, or one without files.
    """
    folder = resolve(folder)
    found = read_index(folder)
    known = found["raylarge"]
    lacking = [name for name in names if name not in found]
    if lacking:
        raise UserError(f"the bundle {folder} lacks {', '.join(lacking)}; train it first.")
    each = {
        name: known.get("digests", {}).get(name) or computed_digest(storage.join(folder, name))
        for name in names or (*PARTS, *CONFIGS)
        if name in found
    }
    if names:
        return storage.digest(*(each[name].encode() for name in names))
    return storage.digest(json.dumps([each, known.get("patch_px")], sort_keys=True).encode())


def computed_digest(folder: str) -> str:
    """The short name of one part, from the files in its folder; read in pieces.

    Raises:
        UserError: there are none.
    """
    names = sorted(storage.sizes(folder))
    if not names:
        raise UserError(f"{folder} holds no files: the bundle is incomplete; copy it whole.")
    return storage.digest_pieces(
        piece for name in names for piece in _content(storage.join(folder, name))
    )


def remove_load_path(folder: str) -> None:
    """Remove from a part's config where diffusers loaded it from, a path of this machine."""
    for path in storage.children(folder, "*.json"):
        values = _mapping(path)
        if values.pop("_name_or_path", None) is not None:
            storage.write_json(path, values)


def _content(path: str) -> Iterator[bytes]:
    """A file without what tells where it was loaded from."""
    if not path.endswith(".json"):
        yield from storage.pieces(path)
        return
    values = _mapping(path)
    values.pop("_name_or_path", None)
    yield json.dumps(values, sort_keys=True).encode()


def _mapping(path: str) -> dict[str, Any]:
    values = storage.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no names and values; copy the bundle again.")
    return values


def _files(folder: str, name: str) -> list[str]:
    """Where a part's tensors are; all of them, there or not."""
    several = storage.join(folder, name, f"{WEIGHTS}.index.json")
    names = [WEIGHTS]
    if storage.exists(several):
        told = _mapping(several).get("weight_map")
        if not isinstance(told, dict):
            raise UserError(f"{several} has no weight_map; copy the bundle again.")
        names = sorted(set(told.values()))
    return [storage.join(folder, name, file) for file in names]


def _tensors(folder: str, name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in _files(folder, name):
        if not storage.exists(path):
            raise UserError(f"{path} does not exist: the bundle is incomplete; copy it whole.")
        try:
            if storage.is_local(path):
                found |= load_file(path.removeprefix("file://"))
            else:
                found |= tensors_of(storage.read_bytes(path))
        except SafetensorError as error:
            raise UserError(
                f"{path} is not readable as safetensors ({error}): it is damaged or cut short; "
                f"copy the bundle again."
            ) from error
    return found


def _from_1(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Format 1 knew no learned variance."""
    return {"learn_sigma": False, **values} if name == "cdm" else values


_MIGRATIONS: dict[int, Callable[[str, dict[str, Any]], dict[str, Any]]] = {1: _from_1}
"""From each format to the next; a config that is of the next already comes back as it is."""
