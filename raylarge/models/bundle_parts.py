"""The files of a bundle: its index, the configs and weights of its parts, older formats.

    model_index.json: {"vae": ["diffusers", "VQModel"], …, "raylarge": {facts, "format": 2}}

Weights are safetensors in one or several files, on a disk or in S3. A bundle of an older format is
converted in memory while it is read, and on disk before a part is added to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, VQModel
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
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
"""Possible classes of each part, by their names in the index."""

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PATH_KEYS = ("data", "out", "logs")
"""Keys of a training that are local paths and say nothing about its result."""
CONFIGS = {"scheduler": "scheduler_config.json"}
"""Config files of folders without weights."""


def exists(folder: str) -> bool:
    """Return whether there is a bundle, complete or not, at a path or URL."""
    return storage.exists(storage.join(folder, INDEX))


def resolve(folder: str) -> str:
    """Return the local folder of a hub id `owner/name`, and any other folder or URL unchanged.

    Raises:
        UserError: the hub is unreachable, or has no such bundle.
    """
    if exists(folder) or not hub.is_repo_id(folder) or storage.exists(folder):
        return folder
    cure = "there is no such folder either: copy the bundle to a disk and give its path."
    patterns = ("*.json", "*.safetensors")
    return str(hub.fetch(folder, (INDEX,), cure, patterns, _is_complete).parent)


def _is_complete(marker: Path) -> bool:
    """Return whether every file that a downloaded index needs is there."""
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
    """Read a bundle's index.

    Raises:
        UserError: no bundle at the path, one of a newer format, or a damaged index.
    """
    path = storage.join(folder, INDEX)
    if not exists(folder):
        raise UserError(
            f"there is no bundle at {folder} (no model_index.json); give the folder that "
            f"python jobs/train.py wrote as out=, or run make demo for a small one."
        )
    index = _read_mapping(path)
    facts = index.get("raylarge", {})
    version = facts.get("format", 0) if isinstance(facts, dict) else facts
    if not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise UserError(
            f"{path}: the bundle has format {version}, this raylarge reads 1 to {FORMAT}; "
            f"install the version of raylarge that wrote it, or a newer one."
        )
    return index


def class_name(folder: str, name: str) -> str:
    """Return the class name of a part that the index lists.

    Raises:
        UserError: a class that this part cannot have.
    """
    entry = read_index(folder)[name]
    class_ = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    if class_ not in list(PARTS[name]):
        path = storage.join(folder, INDEX)
        raise UserError(f"{path}: {name} is a {class_}; expected {', '.join(PARTS[name])}.")
    return str(class_)


def write_index(folder: str, entries: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the list of parts and the facts, without local paths, atomically."""
    public = {name: _without_paths(value) for name, value in facts.items()}
    storage.write_json(storage.join(folder, INDEX), {**entries, "raylarge": public})


def _without_paths(facts: Any) -> Any:
    """Return the facts of a training without local paths; other facts unchanged."""
    if not isinstance(facts, dict) or not isinstance(facts.get("config"), dict):
        return facts
    config = {key: value for key, value in facts["config"].items() if key not in PATH_KEYS}
    return {**facts, "config": storage.without_folders(config)}


def upgrade(folder: str, replaced: Collection[str]) -> dict[str, Any]:
    """Convert a bundle's files to the current format and return its index; {} if there is none.

    Configs are rewritten first, since the old format reads the new ones; the index follows. An
    interrupted conversion leaves a valid bundle and can be repeated.

    Args:
        folder: of the bundle, complete or not.
        replaced: parts that are about to be replaced; not converted.

    Raises:
        UserError: as `read_index`, or a damaged config.
    """
    index = read_index(folder) if exists(folder) else {}
    facts = index.get("raylarge", {})
    if facts.get("format", FORMAT) == FORMAT:
        return index
    digests = facts.setdefault("digests", {})
    for name in [name for name in PARTS if name in index and name not in replaced]:
        path, values = storage.join(folder, name, "config.json"), read_config(folder, name)
        if values != storage.read_json(path):
            if digests.pop(name, None):
                write_index(folder, index, facts)
            storage.write_json(path, values)
            digests[name] = computed_digest(storage.join(folder, name))
    facts["format"] = FORMAT
    write_index(folder, index, facts)
    return index


def index_entry(part: Any) -> list[str]:
    """Return [library, class] of a part for the index; diffusers where it can load the part."""
    if isinstance(part, UNet):
        return ["diffusers", "UNet2DConditionModel"]
    library = "diffusers" if type(part).__module__.startswith("diffusers") else "raylarge"
    return [library, type(part).__name__]


def read_config(folder: str, name: str) -> dict[str, Any]:
    """Return a part's config, converted to the current format.

    Raises:
        UserError: a missing or damaged config.
    """
    values = _read_mapping(storage.join(folder, name, "config.json"))
    values.pop("_name_or_path", None)  # the path from which diffusers loaded the part
    for version in range(int(read_index(folder)["raylarge"]["format"]), FORMAT):
        values = _MIGRATIONS[version](name, values)
    return values


def load_part(folder: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Load a part in evaluation mode, on the CPU; tiny autoencoders in float32.

    Raises:
        UserError: an unknown class, a damaged file, missing or unexpected tensors, or values that
            are NaN, infinite, or too large for the precision.
    """
    class_ = PARTS[name][class_name(folder, name)]
    with torch.device("meta"):
        network = class_.from_config(read_config(folder, name))
    part = weights.fill(network, _tensors(folder, name), f"{folder}: {name}")
    dtype = torch.float32 if isinstance(part, AutoencoderTiny) else dtype
    nn.Module.to(part, dtype)  # diffusers' own `to` may warn
    if dtype == torch.float32:  # `fill` has checked the values
        return part
    large = [name for name, value in part.state_dict().items() if not weights.is_finite(value)]
    if large:
        raise UserError(
            f"{folder}: {name}: values of {large[0]} are too large for "
            f"{str(dtype).removeprefix('torch.')}; choose dtype=bfloat16 or float32."
        )
    return part


def digest(folder: str, names: tuple[str, ...] = ()) -> str:
    """Return a short hash of weights and configs, independent of their location.

    Args:
        folder: of the bundle.
        names: parts to hash; LATENTS are named by `("vae",)`. By default the whole bundle, with
            its schedule and patch side.

    Raises:
        UserError: no bundle, a part that it does not list, or one without files.
    """
    folder = resolve(folder)
    index = read_index(folder)
    facts = index["raylarge"]
    if missing := [name for name in names if name not in index]:
        raise UserError(f"the bundle {folder} lacks {', '.join(missing)}; train it first.")
    digests = {
        name: facts.get("digests", {}).get(name) or computed_digest(storage.join(folder, name))
        for name in names or (*PARTS, *CONFIGS)
        if name in index
    }
    if names:
        return storage.digest(*(digests[name].encode() for name in names))
    return storage.digest(json.dumps([digests, facts.get("patch_px")], sort_keys=True).encode())


def computed_digest(folder: str) -> str:
    """Return the hash of the files in the folder of a part, read in pieces.

    Raises:
        UserError: there are no files.
    """
    names = sorted(storage.sizes(folder))
    if not names:
        raise UserError(f"{folder} contains no files: the bundle is incomplete; copy it whole.")
    return storage.digest_chunks(
        piece for name in names for piece in _content(storage.join(folder, name))
    )


def remove_load_path(folder: str) -> None:
    """Remove the local path from which diffusers loaded a part from its config."""
    for path in storage.children(folder, "*.json"):
        values = _read_mapping(path)
        if values.pop("_name_or_path", None) is not None:
            storage.write_json(path, values)


def _content(path: str) -> Iterator[bytes]:
    """Yield the content of a file, without a local path in its config."""
    if not path.endswith(".json"):
        yield from storage.chunks(path)
        return
    values = _read_mapping(path)
    values.pop("_name_or_path", None)
    yield json.dumps(values, sort_keys=True).encode()


def _read_mapping(path: str) -> dict[str, Any]:
    values = storage.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object; copy the bundle again.")
    return values


def _files(folder: str, name: str) -> list[str]:
    """Return the paths of a part's weights, whether they exist or not."""
    shards = storage.join(folder, name, f"{WEIGHTS}.index.json")
    names = [WEIGHTS]
    if storage.exists(shards):
        weight_map = _read_mapping(shards).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{shards} has no weight_map; copy the bundle again.")
        names = sorted(set(weight_map.values()))
    return [storage.join(folder, name, file) for file in names]


def _tensors(folder: str, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in _files(folder, name):
        if not storage.exists(path):
            raise UserError(f"{path} does not exist: the bundle is incomplete; copy it whole.")
        try:
            if storage.is_local(path):
                tensors |= load_file(path.removeprefix("file://"))
            else:
                tensors |= load_bytes(storage.read_bytes(path))
        except SafetensorError as error:
            raise UserError(
                f"{path} is not readable as safetensors ({error}): it is damaged or cut short; "
                f"copy the bundle again."
            ) from error
    return tensors


def _from_1(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Add `learn_sigma`, which format 1 did not have."""
    return {"learn_sigma": False, **values} if name == "cdm" else values


_MIGRATIONS: dict[int, Callable[[str, dict[str, Any]], dict[str, Any]]] = {1: _from_1}
"""By format, the conversion to the next; it leaves configs of the next unchanged."""
