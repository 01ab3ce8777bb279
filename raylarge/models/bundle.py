"""A bundle: a folder in the diffusers layout with all networks that sampling needs.

    model_index.json  vae/ unet/ scheduler/ summarizer/ cdm/ prior/ controlnet/
                      (each config.json + safetensors; diffusers loads its own classes unchanged)

Trainings add parts one by one. `model_index.json` lists the complete parts, and facts: patch side,
encoder, licences, configs, digests.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError

from raylarge import storage
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.models import bundle_parts as files
from raylarge.models import weights
from raylarge.models.autoencoder import Autoencoder, latent_sizes
from raylarge.models.bundle_lock import saving
from raylarge.models.bundle_parts import PARTS, digest
from raylarge.models.denoiser import Denoiser, NetworkDenoiser

__all__ = ["PARTS", "Bundle", "digest", "facts", "load", "load_autoencoder", "patch_of", "save"]
REQUIRED = ("vae", "unet", "summarizer")
TRAINED_ON = {
    "vae_small": ("vae",),
    "ldm": ("vae",),
    "cdm": ("summarizer",),
    "controlnet": ("unet", "summarizer"),
}
"""By model, the parts that it was trained on; its facts contain their digest as `on`."""
MAIN_PART = {"ldm": "unet", **{name: name for name in ("vae_small", "cdm", "prior", "controlnet")}}
"""By model, its main part."""
_TEMPORARY = ".part-"
"""Prefix of temporary folders; a killed process leaves one behind."""


@dataclass(frozen=True)
class Bundle:
    """The parts in evaluation mode on one device, and the facts that sampling needs.

    `summarizer` is any conditioner (`models/conditioner.py`); missing parts are None.
    """

    vae: Any
    unet: Any
    summarizer: Any
    cdm: Any
    schedule: Schedule
    patch: Patch
    digest: str
    device: str = "cpu"
    prior: Any = None
    controlnet: Any = None
    vae_small: Any = None
    base_mpp: float | None = None

    def denoiser(self) -> Denoiser:
        """Return the U-Net as a denoiser."""
        return NetworkDenoiser(self.unet, self.schedule)


def default_device() -> str:
    """Return `cuda` if this process may use a GPU (Ray hides the others), else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def save(
    folder: str,
    parts: dict[str, Any],
    facts: dict[str, Any],
    schedule: Schedule | None = None,
) -> None:
    """Write parts and facts into a bundle, which need not exist yet.

    A part is removed from the index before it is replaced and listed again when it is complete, so
    a reader, also after a kill, gets parts that fit together or an error that names the missing
    ones. Leftovers of killed processes are removed, an older format is upgraded first, and other
    processes that save wait.

    Args:
        folder: a local folder or a URL such as `s3://bucket/bundle`.
        parts: by name, some of `PARTS`.
        facts: merged into those of the bundle: patch side, encoder, licence, trainings.
        schedule: of the U-Net; the published one by default.

    Raises:
        UserError: an unknown part, one that is not finite, a file at the folder's path, or a
            damaged bundle. Nothing is replaced then.
    """
    for name, part in parts.items():
        weights.check_finite(part.state_dict(), f"{storage.join(folder, name)} is not written")
    local = _prepare_folder(folder, parts.keys())
    if "unet" in parts:
        scheduler = DDIMScheduler(**_scheduler_config(schedule or Schedule()))
        parts = {"scheduler": scheduler, **parts}  # first: a U-Net needs its own
    with saving(folder):
        _save(folder, parts, facts, local)


def _save(folder: str, parts: dict[str, Any], facts: dict[str, Any], local: str | None) -> None:
    for leftover in Path(local).glob(f"{_TEMPORARY}*") if local else ():
        shutil.rmtree(leftover, ignore_errors=True)
    index, before = _unlist(folder, parts.keys())
    digests = dict(before.get("digests", {}))
    facts = {**before, **facts, "format": files.FORMAT, "digests": digests}
    for name, part in parts.items():
        part = part.network if isinstance(part, Autoencoder) else part
        digests[name] = _write_part(part, storage.join(folder, name), local)
        index[name] = files.index_entry(part)
        files.write_index(folder, index, facts)
    if not parts:
        files.write_index(folder, index, facts)


def _unlist(folder: str, names: Set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Remove parts and their digests from the index; return index and facts."""
    index = files.upgrade(folder, names)
    facts = index.pop("raylarge", {})
    digests = facts.get("digests", {})
    if names & (index.keys() | digests.keys()):
        for name in names:
            index.pop(name, None)
            digests.pop(name, None)
        files.write_index(folder, index, facts)
    return index, facts


def _prepare_folder(folder: str, names: Set[str]) -> str | None:
    """Create a folder and return its local path; None for a URL.

    Raises:
        UserError: unknown parts, or a file at the folder's path.
    """
    unknown = sorted(names - PARTS.keys())
    if unknown:
        raise UserError(
            f"a bundle has no part {', '.join(unknown)}; its parts: {', '.join(PARTS)}."
        )
    if not storage.is_local(folder):
        return None
    local = storage.absolute(folder)
    try:
        Path(local).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{folder} cannot be a bundle: it is a file; name a folder.") from error
    return local


def _write_part(part: Any, target: str, local: str | None) -> str:
    """Write or replace a part; return its digest, computed before any upload."""
    with tempfile.TemporaryDirectory(dir=local, prefix=_TEMPORARY) as folder:
        source = Path(folder, "part")
        source.mkdir()
        try:
            part.save_pretrained(source)
        except SafetensorError as error:  # such as a full disk
            raise UserError(
                f"{target} could not be written ({error}); make room, then run the same again."
            ) from error
        files.remove_load_path(str(source))
        for path in source.iterdir():  # safetensors writes files that only their owner may read
            path.chmod(source.stat().st_mode & 0o666)
        digest = files.computed_digest(str(source))
        storage.put_folder(source, target)
    return digest


def load(
    folder: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    without: Set[str] = frozenset(),
) -> Bundle:
    """Load a complete bundle.

    Args:
        folder: a local folder, a URL such as `s3://bucket/bundle`, or a hub id `owner/name`.
        device: of the parts; in half precision or on a GPU they are channels-last.
        dtype: of the networks; a tiny autoencoder stays in float32 (see `Autoencoder`).
        without: parts to leave out, even if damaged.

    Raises:
        UserError: no bundle there, one of a newer format, parts that are missing or were trained
            on others than the bundle has now, a damaged file, or tensors that are missing or
            unexpected.
    """
    folder = files.resolve(folder)
    index = files.read_index(folder)
    _check(folder, index, without)
    parts: dict[str, Any] = {
        name: files.load_part(folder, name, dtype) if name in index.keys() - without else None
        for name in PARTS
    }
    fast = dtype != torch.float32 or device != "cpu"
    layout = torch.channels_last if fast else torch.preserve_format
    for part in filter(None, parts.values()):
        part.to(device).to(memory_format=layout)
    return Bundle(
        **{**parts, **_codecs(folder, parts)},
        schedule=_schedule(folder),
        patch=patch_of(folder),
        digest=digest(folder),
        device=device,
        base_mpp=facts(folder).get("base_mpp"),
    )


def _check(folder: str, index: dict[str, Any], without: Set[str]) -> None:
    """Raise if a bundle is incomplete, or if its parts do not fit together."""
    missing = [name for name in REQUIRED if name not in index]
    if missing:
        raise UserError(
            f"the bundle {folder} lacks {', '.join(missing)}; train it with "
            f"python jobs/train.py model={'vae' if 'vae' in missing else 'ldm'} out={folder}."
        )
    for name, message in mismatched_parts(folder).items():
        if name not in without:
            raise UserError(message)


def mismatched_parts(folder: str) -> dict[str, str]:
    """Return, by name, messages on parts that were trained on other parts than those present."""
    index = files.read_index(folder) if files.exists(folder) else {}
    facts, messages = index.get("raylarge", {}), {}
    for model, bases in TRAINED_ON.items():
        training, part = facts.get(model), MAIN_PART[model]
        on = training.get("on") if isinstance(training, dict) else None
        if not on or part not in index or not index.keys() >= set(bases):
            continue
        if on != digest(folder, bases):
            messages[part] = (
                f"{part} in {folder} was trained on another {' and '.join(bases)} than there "
                f"is now; restore the old one, or train it again after removing "
                f"{storage.join(folder, '.train', model)}."
            )
    return messages


def _codecs(folder: str, parts: dict[str, Any]) -> dict[str, Autoencoder]:
    """Return the autoencoder, and the small one if there is one.

    Raises:
        UserError: the small one has another factor or other channels.
    """
    codecs = {
        name: Autoencoder(parts[name]) for name in ("vae", "vae_small") if parts[name] is not None
    }
    size, *small = ((codec.factor, codec.channels) for codec in codecs.values())
    if small not in ([], [size]):
        raise UserError(
            f"{storage.join(folder, 'vae_small')} has factor and channels {small[0]}, the "
            f"bundle's vae {size}; distil one from that vae, or remove it from {files.INDEX}."
        )
    return codecs


def load_autoencoder(folder: str) -> Any:
    """Load only the autoencoder, on the CPU; its attribute `digest` names its weights.

    Raises:
        UserError: no bundle at the path, or no trained autoencoder in it.
    """
    folder = files.resolve(folder)
    if "vae" not in files.read_index(folder):
        raise UserError(
            f"the bundle {folder} has no autoencoder; train one with "
            f"python jobs/train.py model=vae out={folder}."
        )
    vae = Autoencoder(files.load_part(folder, "vae"))
    vae.digest = digest(folder, ("vae",))  # type: ignore[assignment]
    return vae


def patch_of(folder: str) -> Patch:
    """Return the sizes of patches and latents, from the configs alone.

    Raises:
        UserError: no bundle at the path, or one without them.
    """
    side_px = files.read_index(folder)["raylarge"].get("patch_px")
    if not isinstance(side_px, int) or side_px < 1:
        raise UserError(
            f"{storage.join(folder, files.INDEX)} gives {side_px} as patch_px; write the side of "
            f'the training images there, such as "patch_px": 256, under "raylarge".'
        )
    try:
        factor, channels = latent_sizes(
            files.class_name(folder, "vae"), files.read_config(folder, "vae")
        )
        scales = files.read_config(folder, "summarizer")["scales"]
    except KeyError as error:
        raise UserError(f"the bundle {folder} lacks {error}; copy it again.") from error
    return Patch(side_px=side_px, factor=factor, channels=channels, scales=scales)


def facts(folder: str) -> dict[str, Any]:
    """Return the facts of a bundle; empty if there is no bundle."""
    return dict(files.read_index(folder).get("raylarge", {})) if files.exists(folder) else {}


_SQUAREDCOS = ("squaredcos", "squaredcos_cap_v2")
"""Our and diffusers' name of the one schedule that is named differently."""


def _schedule(folder: str) -> Schedule:
    path = storage.join(folder, "scheduler", files.CONFIGS["scheduler"])
    values = storage.read_json(path)
    try:
        name = values["beta_schedule"]
        schedule = Schedule(
            name=_SQUAREDCOS[0] if name == _SQUAREDCOS[1] else name,
            length=values["num_train_timesteps"],
            beta_start=values["beta_start"],
            beta_end=values["beta_end"],
            prediction=values["prediction_type"],
        )
        if len(schedule.abar) < 2:
            raise ValueError(f"{schedule.length} timesteps")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} describes no schedule that raylarge supports ({error}); give it beta_schedule "
            f"scaled_linear, linear or {_SQUAREDCOS[1]}, and prediction_type epsilon, "
            f"v_prediction or sample."
        ) from error
    return schedule


def _scheduler_config(schedule: Schedule) -> dict[str, Any]:
    return {
        "num_train_timesteps": schedule.length,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": _SQUAREDCOS[1] if schedule.name == _SQUAREDCOS[0] else schedule.name,
        "prediction_type": schedule.prediction,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
