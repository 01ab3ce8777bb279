"""What must be known of a bundle to plan orders for it, without its weights at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raylarge import storage
from raylarge.geometry import Patch
from raylarge.models import bundle as bundles
from raylarge.models.bundle import Bundle


@dataclass(frozen=True)
class Facts:
    """A bundle as those see it who ask its workers.

    Attributes:
        patch: the sizes that orders are checked against.
        digest: names the weights.
        channels: of the embeddings that condition it.
        cdm: whether it can draw conditions by itself.
    """

    patch: Patch
    digest: str
    channels: int
    cdm: bool

    @classmethod
    def of(cls, bundle: Bundle) -> Facts:
        """The facts of a loaded bundle."""
        channels = int(bundle.summarizer.config.channels)
        return cls(bundle.patch, bundle.digest, channels, bundle.cdm is not None)

    @classmethod
    def read(cls, folder: str) -> Facts:
        """The same facts, read from a bundle's folder.

        Raises:
            UserError: there is no bundle, or a part was not trained yet.
        """
        require(folder)
        vae, summarizer = _config(folder, "vae"), _config(folder, "summarizer")
        patch = Patch(
            side_px=int(bundles.facts(folder)["patch_px"]),
            factor=vae["factor"],
            channels=vae["latent_channels"],
            scales=summarizer["scales"],
        )
        cdm = storage.exists(storage.join(folder, "cdm"))
        return cls(patch, bundles.digest(folder), int(summarizer["channels"]), cdm)


def require(folder: str) -> None:
    """Refuse a bundle that cannot sample, before anything is started for it.

    Raises:
        UserError: there is none, or a part was not trained yet.
    """
    needed = ("model_index.json", "vae", "unet", "summarizer")
    if not all(storage.exists(storage.join(folder, name)) for name in needed):
        bundles.load(folder)  # fails, and its error says what is missing and how to make it


def _config(folder: str, part: str) -> dict[str, Any]:
    config: dict[str, Any] = storage.read_json(storage.join(folder, part, "config.json"))
    return config
