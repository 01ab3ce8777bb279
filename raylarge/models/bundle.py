"""A bundle: a folder in the diffusers layout that holds everything needed to sample.

    model_index.json  vae/ unet/ scheduler/ summarizer/ cdm/ prior/ controlnet/
                      (each config.json + safetensors; diffusers loads its own as they are)

Training adds parts one after the other; `model_index.json` lists those that are whole and
carries the facts: patch side, encoder, licences, configs, digests. Loading names what is missing.
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
"""By trained model, the parts that it was trained on; its facts tell their digest as `on`."""
MAIN_PART = {"ldm": "unet", **{name: name for name in ("vae_small", "cdm", "prior", "controlnet")}}
"""By trained model, the part that it is known by."""
_MAKING = ".part-"
"""How the folders begin in which parts are made; a killed run leaves one behind."""


@dataclass(frozen=True)
class Bundle:
    """The parts in evaluation mode on one device, and the facts that sampling plans with.

    `summarizer` is any conditioner (`models/conditioner.py`); the parts that a bundle does not have
    are None.
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
        """The U-Net as a denoiser."""
        return NetworkDenoiser(self.unet, self.schedule)


def default_device() -> str:
    """`cuda` where this process may use a GPU (Ray hides those it was not given), else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def save(
    folder: str,
    parts: dict[str, Any],
    facts: dict[str, Any],
    schedule: Schedule | None = None,
) -> None:
    """Write parts and facts into a bundle, new or begun, part by part.

    Before anything is replaced the index ceases to list it; each part is listed again as soon as
    it is whole, so whoever opens the bundle meanwhile, or after a kill, finds parts that belong
    together or is told which are missing. What a killed run left is removed. An older format is
    brought up to date first; other processes that save wait.

    Args:
        folder: a local folder or a URL such as `s3://bucket/bundle`.
        parts: some of `PARTS` by name.
        facts: merged into what the bundle knows: patch side, encoder, licence, trainings.
        schedule: the U-Net's; the published one if left out.

    Raises:
        UserError: an unknown part, one that is not finite, a file in the folder's place, or a
            damaged bundle. Nothing is replaced then.
    """
    for name, part in parts.items():
        weights.check_finite(part.state_dict(), f"{storage.join(folder, name)} is not written")
    near = _begun(folder, parts.keys())
    if "unet" in parts:
        walk = DDIMScheduler(**_scheduler_config(schedule or Schedule()))
        parts = {"scheduler": walk, **parts}  # first: a U-Net never stands without its own
    with saving(folder):
        _save(folder, parts, facts, near)


def _save(folder: str, parts: dict[str, Any], facts: dict[str, Any], near: str | None) -> None:
    for left in Path(near).glob(f"{_MAKING}*") if near else ():
        shutil.rmtree(left, ignore_errors=True)
    index, before = _without(folder, parts.keys())
    digests = dict(before.get("digests", {}))
    known = {**before, **facts, "format": files.FORMAT, "digests": digests}
    for name, part in parts.items():
        part = part.network if isinstance(part, Autoencoder) else part
        digests[name] = _put(part, storage.join(folder, name), near)
        index[name] = files.index_entry(part)
        files.write_index(folder, index, known)
    if not parts:
        files.write_index(folder, index, known)


def _without(folder: str, names: Set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The index and the facts of a bundle that ceases to list some parts and their digests."""
    index = files.upgrade(folder, names)
    known = index.pop("raylarge", {})
    digests = known.get("digests", {})
    if names & (index.keys() | digests.keys()):
        for name in names:
            index.pop(name, None)
            digests.pop(name, None)
        files.write_index(folder, index, known)
    return index, known


def _begun(folder: str, names: Set[str]) -> str | None:
    """Make a folder, and return its local path, if it has one.

    Raises:
        UserError: parts that no bundle has, or a file in the folder's place.
    """
    unknown = sorted(names - PARTS.keys())
    if unknown:
        raise UserError(
            f"a bundle has no part {', '.join(unknown)}; its parts: {', '.join(PARTS)}."
        )
    if not storage.is_local(folder):
        return None
    near = storage.absolute(folder)
    try:
        Path(near).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} cannot be a bundle: a file stands there; name a folder."
        ) from error
    return near


def _put(part: Any, target: str, near: str | None) -> str:
    """Write a part in the place of another; its digest, taken before it leaves this machine."""
    with tempfile.TemporaryDirectory(dir=near, prefix=_MAKING) as folder:
        made = Path(folder, "part")
        made.mkdir()
        try:
            part.save_pretrained(made)
        except SafetensorError as error:  # its own for a disk that is full
            raise UserError(
                f"{target} could not be written ({error}); make room, then run the same again."
            ) from error
        files.remove_load_path(str(made))
        for path in made.iterdir():  # safetensors lets only the owner read what it writes
            path.chmod(made.stat().st_mode & 0o666)
        digest = files.computed_digest(str(made))
        storage.put_folder(made, target)
    return digest


def load(
    folder: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    without: Set[str] = frozenset(),
) -> Bundle:
    """A whole bundle.

    Args:
        folder: a local folder, a URL such as `s3://bucket/bundle`, or a hub id `owner/name`.
        device: where the parts go; in half precision or on a GPU they are channels-last.
        dtype: of the networks; a tiny autoencoder stays in float32 (`Autoencoder` says why).
        without: parts that are left out, whatever is the matter with them.

    Raises:
        UserError: no bundle there, one of a newer format, parts that were not trained yet, or
            on other parts than there are now, a damaged file (which it names), or tensors that
            are missing or unknown.
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
    """Refuse a bundle that is not whole, or whose parts do not belong together."""
    missing = [name for name in REQUIRED if name not in index]
    if missing:
        raise UserError(
            f"the bundle {folder} lacks {', '.join(missing)}; train it with "
            f"python jobs/train.py model={'vae' if 'vae' in missing else 'ldm'} out={folder}."
        )
    if problems := [said for name, said in mismatched_parts(folder).items() if name not in without]:
        raise UserError(problems[0])


def mismatched_parts(folder: str) -> dict[str, str]:
    """By part, what is to be said of those that were trained on others than there are now."""
    index = files.read_index(folder) if files.exists(folder) else {}
    known, said = index.get("raylarge", {}), {}
    for model, ground in TRAINED_ON.items():
        its, part = known.get(model), MAIN_PART[model]
        on = its.get("on") if isinstance(its, dict) else None
        if not on or part not in index or not index.keys() >= set(ground):
            continue
        if on != digest(folder, ground):
            said[part] = (
                f"{part} in {folder} was trained on another {' and '.join(ground)} than there "
                f"is now; bring the old back, or train it again after removing "
                f"{storage.join(folder, '.train', model)}."
            )
    return said


def _codecs(folder: str, parts: dict[str, Any]) -> dict[str, Autoencoder]:
    """The autoencoder, and the small one where there is one, which must have the same latent.

    Raises:
        UserError: it has another factor or other channels.
    """
    found = {
        name: Autoencoder(parts[name]) for name in ("vae", "vae_small") if parts[name] is not None
    }
    wanted, *given = ((codec.factor, codec.channels) for codec in found.values())
    if given not in ([], [wanted]):
        raise UserError(
            f"{storage.join(folder, 'vae_small')} has factor and channels {given[0]}, the "
            f"bundle's vae {wanted}; distil one from that vae, or take it out of {files.INDEX}."
        )
    return found


def load_autoencoder(folder: str) -> Any:
    """The autoencoder alone, on the CPU, with `digest` naming its weights.

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
    """What the networks see, read from the configs alone.

    Raises:
        UserError: no bundle at the path, or one that does not tell it.
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
    """What a bundle knows about itself beside its weights; empty where there is none yet."""
    return dict(files.read_index(folder).get("raylarge", {})) if files.exists(folder) else {}


_SQUAREDCOS = ("squaredcos", "squaredcos_cap_v2")
"""Ours and diffusers' name of one schedule; they share the others."""


def _schedule(folder: str) -> Schedule:
    path = storage.join(folder, "scheduler", files.CONFIGS["scheduler"])
    values = storage.read_json(path)
    try:
        name = values["beta_schedule"]
        made = Schedule(
            name=_SQUAREDCOS[0] if name == _SQUAREDCOS[1] else name,
            length=values["num_train_timesteps"],
            beta_start=values["beta_start"],
            beta_end=values["beta_end"],
            prediction=values["prediction_type"],
        )
        if len(made.abar) < 2:
            raise ValueError(f"{made.length} timesteps")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} describes no schedule that raylarge knows ({error}); give it beta_schedule "
            f"scaled_linear, linear or {_SQUAREDCOS[1]}, and prediction_type epsilon, "
            f"v_prediction or sample."
        ) from error
    return made


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
