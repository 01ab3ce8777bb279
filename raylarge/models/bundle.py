"""A bundle: a folder in the diffusers layout that holds everything needed to sample.

    model_index.json  unet/  scheduler/  vae/  summarizer/  cdm/     (config.json + safetensors)

Training adds parts one after the other; each is written beside and renamed, and
`model_index.json`, which lists them, comes last. Loading names what is missing.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from raylarge import storage
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.models.autoencoder import LightAutoencoder
from raylarge.models.cdm import CDM
from raylarge.models.denoiser import Denoiser, NetworkDenoiser
from raylarge.models.summarizer import Summarizer

FORMAT = 1
PARTS: dict[str, type] = {
    "vae": LightAutoencoder,
    "unet": UNet2DConditionModel,
    "summarizer": Summarizer,
    "cdm": CDM,
}


@dataclass(frozen=True)
class Bundle:
    """The parts in evaluation mode on one device, and the facts that sampling plans with."""

    vae: Any
    unet: Any
    summarizer: Any
    cdm: Any
    schedule: Schedule
    patch: Patch
    digest: str
    device: str = "cpu"

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
    """Write parts and facts into a bundle, new or begun, atomically part by part.

    Args:
        parts: some of `PARTS` by name.
        facts: merged into what the bundle knows: `patch_px`, `encoder`, the config of each
            training, digests of the data.
        schedule: the U-Net's; the published one if left out.

    Raises:
        UserError: the folder is no local path.
    """
    if not storage.is_local(folder):
        raise UserError(f"a bundle is written to a disk that the nodes share, not to {folder}.")
    index = _index(folder) if storage.exists(storage.join(folder, "model_index.json")) else {}
    if "unet" in parts:
        parts = {**parts, "scheduler": DDIMScheduler(**_scheduler_config(schedule or Schedule()))}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            part.save_pretrained(Path(made, name))
            storage.replace_folder(Path(made, name), Path(folder, name))
        library = "diffusers" if type(part).__module__.startswith("diffusers") else "raylarge"
        index[name] = [library, type(part).__name__]
    index["raylarge"] = {**index.get("raylarge", {}), **facts, "format": FORMAT}
    storage.write_json(storage.join(folder, "model_index.json"), index)


def load(folder: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Bundle:
    """A whole bundle.

    Raises:
        UserError: no bundle at the path, or parts that were not trained yet.
    """
    index = _index(folder)
    missing = [name for name in ("vae", "unet", "summarizer") if name not in index]
    if missing:
        raise UserError(
            f"the bundle {folder} lacks {', '.join(missing)}; train it with "
            f"python jobs/train.py model={'vae' if 'vae' in missing else 'ldm'} out={folder}."
        )
    parts = {
        name: _part(folder, name, dtype).to(device) if name in index else None for name in PARTS
    }
    vae, summarizer = parts["vae"], parts["summarizer"]
    patch = Patch(
        side_px=int(index["raylarge"]["patch_px"]),
        factor=vae.config.factor,  # type: ignore[union-attr]
        channels=vae.config.latent_channels,  # type: ignore[union-attr]
        scales=summarizer.config.scales,  # type: ignore[union-attr]
    )
    return Bundle(
        **parts,
        schedule=_schedule(folder),
        patch=patch,
        digest=digest(folder),
        device=device,
    )


def load_autoencoder(folder: str) -> Any:
    """The autoencoder alone, on the CPU, with `digest` naming its weights.

    Raises:
        UserError: no bundle at the path, or no trained autoencoder in it.
    """
    if "vae" not in _index(folder):
        raise UserError(
            f"the bundle {folder} has no autoencoder; train one with "
            f"python jobs/train.py model=vae out={folder}."
        )
    vae = _part(folder, "vae")
    vae.digest = digest(folder, ("vae",))
    return vae


def facts(folder: str) -> dict[str, Any]:
    """What a bundle knows about itself beside its weights; empty where there is none yet."""
    if not storage.exists(storage.join(folder, "model_index.json")):
        return {}
    return dict(_index(folder).get("raylarge", {}))


def digest(folder: str, names: tuple[str, ...] = tuple(PARTS)) -> str:
    """A short name for the weights and configurations of some parts, wherever they lie."""
    files = [path for name in names for path in storage.listing(f"{folder}/{name}/*")]
    return storage.digest(*map(_content, files))


def _content(path: str) -> bytes:
    """A file without what tells where it was loaded from."""
    if not path.endswith(".json"):
        return storage.read_bytes(path)
    values = storage.read_json(path)
    values.pop("_name_or_path", None)
    return json.dumps(values, sort_keys=True).encode()


def _part(folder: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    path = storage.join(folder, name)
    return PARTS[name].from_pretrained(path, torch_dtype=dtype, low_cpu_mem_usage=False).eval()  # type: ignore[attr-defined]


def _index(folder: str) -> dict[str, Any]:
    path = storage.join(folder, "model_index.json")
    if not storage.exists(path):
        raise UserError(
            f"there is no bundle at {folder} (no model_index.json); give the folder that "
            f"python jobs/train.py wrote as out=, or run make demo for a small one."
        )
    return dict(json.loads(storage.read_bytes(path)))


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
