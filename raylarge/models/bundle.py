"""A bundle: a folder in the diffusers layout that holds everything needed to sample.

    model_index.json  vae/ unet/ scheduler/ summarizer/ cdm/ prior/ controlnet/
                      (each config.json + safetensors; diffusers loads its own as they are)

Training adds parts one after the other; `model_index.json`, which lists them, comes last and
carries the facts: patch side, encoder, licences, configs, digests. Loading names what is missing.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler

from raylarge import storage
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.models import parts as files
from raylarge.models.autoencoder import Autoencoder, sizes
from raylarge.models.denoiser import Denoiser, NetworkDenoiser
from raylarge.models.parts import PARTS, digest

__all__ = ["PARTS", "Bundle", "digest", "facts", "load", "load_autoencoder", "patch_of", "save"]
NEEDED = ("vae", "unet", "summarizer")


@dataclass(frozen=True)
class Bundle:
    """The parts in evaluation mode on one device, and the facts that sampling plans with.

    `summarizer` is any conditioner (`models/cells.py`); the parts that a bundle does not have
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

    def denoiser(self) -> Denoiser:
        """The U-Net as a denoiser."""
        return NetworkDenoiser(self.unet, self.schedule)


def usable_device() -> str:
    """`cuda` where this process may use a GPU (Ray hides those it was not given), else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def save(
    folder: str,
    parts: dict[str, Any],
    facts: dict[str, Any],
    schedule: Schedule | None = None,
) -> None:
    """Write parts and facts into a bundle, new or begun, part by part.

    While a part is replaced the index does not list it: a reader finds the old part, the new
    one, or is told that it is missing.

    Args:
        folder: a local folder or a URL such as `s3://bucket/bundle`.
        parts: some of `PARTS` by name.
        facts: merged into what the bundle knows: `patch_px`, `encoder` (its card), `licence`,
            the config of each training, digests of the data.
        schedule: the U-Net's; the published one if left out.
    """
    index = files.index(folder) if files.there(folder) else {}
    near = storage.absolute(folder) if storage.is_local(folder) else None
    if near is not None:
        Path(near).mkdir(parents=True, exist_ok=True)
    if "unet" in parts:
        parts = {**parts, "scheduler": DDIMScheduler(**_scheduler_config(schedule or Schedule()))}
    known = {**index.pop("raylarge", {}), **facts, "format": files.FORMAT}
    digests = dict(known.get("digests", {}))
    for name, part in parts.items():
        part = part.network if isinstance(part, Autoencoder) else part
        if name in index and not storage.is_local(folder):
            del index[name]
            files.write_index(folder, index, known)
        with tempfile.TemporaryDirectory(dir=near) as made:
            part.save_pretrained(Path(made, name))
            storage.put_folder(Path(made, name), storage.join(folder, name))
        index[name] = files.entry(part)
        digests[name] = files.computed_digest(folder, (name,))
    files.write_index(folder, index, {**known, "digests": digests})


def load(folder: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
    """A whole bundle.

    Args:
        folder: a local folder, a URL such as `s3://bucket/bundle`, or a hub id `owner/name`.
        device: where the parts go; in half precision or on a GPU they are channels-last.
        dtype: of the networks; a tiny autoencoder stays in float32 (`Autoencoder` says why).

    Raises:
        UserError: no bundle there, one of a newer format, parts that were not trained yet, or
            tensors that are missing or unknown.
    """
    folder = files.local(folder)
    index = files.index(folder)
    missing = [name for name in NEEDED if name not in index]
    if missing:
        raise UserError(
            f"the bundle {folder} lacks {', '.join(missing)}; train it with "
            f"python jobs/train.py model={'vae' if 'vae' in missing else 'ldm'} out={folder}."
        )
    parts: dict[str, Any] = {
        name: files.part(folder, name, dtype) if name in index else None for name in PARTS
    }
    if isinstance(parts["vae"], AutoencoderTiny):
        parts["vae"] = parts["vae"].float()
    fast = dtype != torch.float32 or device != "cpu"
    layout = torch.channels_last if fast else torch.preserve_format
    for part in filter(None, parts.values()):
        part.to(device).to(memory_format=layout)
    return Bundle(
        **{**parts, "vae": Autoencoder(parts["vae"])},
        schedule=_schedule(folder),
        patch=patch_of(folder),
        digest=digest(folder),
        device=device,
    )


def load_autoencoder(folder: str) -> Any:
    """The autoencoder alone, on the CPU, with `digest` naming its weights.

    Raises:
        UserError: no bundle at the path, or no trained autoencoder in it.
    """
    folder = files.local(folder)
    if "vae" not in files.index(folder):
        raise UserError(
            f"the bundle {folder} has no autoencoder; train one with "
            f"python jobs/train.py model=vae out={folder}."
        )
    vae = Autoencoder(files.part(folder, "vae"))
    vae.digest = digest(folder, ("vae",))  # type: ignore[assignment]
    return vae


def patch_of(folder: str) -> Patch:
    """What the networks see, read from the configs alone.

    Raises:
        UserError: no bundle at the path.
    """
    index = files.index(folder)
    factor, channels = sizes(index["vae"][1], files.config(folder, "vae"))
    return Patch(
        side_px=int(index["raylarge"]["patch_px"]),
        factor=factor,
        channels=channels,
        scales=files.config(folder, "summarizer")["scales"],
    )


def facts(folder: str) -> dict[str, Any]:
    """What a bundle knows about itself beside its weights; empty where there is none yet."""
    return dict(files.index(folder).get("raylarge", {})) if files.there(folder) else {}


def _schedule(folder: str) -> Schedule:
    values = storage.read_json(storage.join(folder, "scheduler", "scheduler_config.json"))
    return Schedule(
        name=values["beta_schedule"],
        length=values["num_train_timesteps"],
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        prediction=values["prediction_type"],
    )


def _scheduler_config(schedule: Schedule) -> dict[str, Any]:
    return {
        "num_train_timesteps": schedule.length,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.name,
        "prediction_type": schedule.prediction,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
