"""What must be known of a bundle to plan orders for it, without its weights at hand."""

from __future__ import annotations

from dataclasses import dataclass

from raylarge.geometry import Patch
from raylarge.models import bundle as bundles
from raylarge.models import parts
from raylarge.models.bundle import Bundle


@dataclass(frozen=True)
class Facts:
    """A bundle as those see it who ask its workers.

    Attributes:
        patch: the sizes that orders are checked against.
        digest: names the weights.
        channels: of the embeddings that condition it.
        cdm: whether it can draw conditions by itself.
        base_mpp: micrometres per pixel of scale 0, where the bundle knows them.
    """

    patch: Patch
    digest: str
    channels: int
    cdm: bool
    base_mpp: float | None = None

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
        channels = int(parts.config(folder, "summarizer")["channels"])
        return cls(
            bundles.patch_of(folder), bundles.digest(folder), channels, "cdm" in parts.index(folder)
        )


def require(folder: str) -> None:
    """Refuse a bundle that cannot sample, before anything is started for it.

    Raises:
        UserError: there is none, or a part was not trained yet.
    """
    if not parts.there(folder) or not set(bundles.NEEDED) <= set(parts.index(folder)):
        bundles.load(folder)  # fails, and its error says what is missing and how to make it
