"""The facts of a bundle that plans depend on, read without its weights."""

from __future__ import annotations

from dataclasses import dataclass

from raylarge.errors import UserError
from raylarge.geometry import Patch
from raylarge.models import bundle as bundles
from raylarge.models import bundle_parts
from raylarge.models.bundle import Bundle
from raylarge.order import Order


@dataclass(frozen=True)
class BundleFacts:
    """What plans need to know of a bundle.

    Attributes:
        patch: the sizes that orders are checked against.
        digest: names the weights.
        channels: of the embeddings that condition it.
        cdm: whether it can draw conditions by itself.
        prior: width of the vectors that its grid prior takes; 0 without one.
        controlnet: whether it has one.
        small: whether it has a small autoencoder.
        base_mpp: micrometres per pixel of scale 0, where the bundle knows them.
    """

    patch: Patch
    digest: str
    channels: int
    cdm: bool
    prior: int = 0
    controlnet: bool = False
    small: bool = False
    base_mpp: float | None = None

    def check(self, order: Order) -> None:
        """Refuse an order that needs parts which the bundle lacks.

        Raises:
            UserError: what is missing, and the cure.
        """
        condition = order.condition
        if condition.kind == "cdm" and not self.cdm:
            raise UserError(
                "condition.kind cdm: the bundle has no CDM; train one with python jobs/train.py "
                "model=cdm, or choose condition.kind=null."
            )
        if condition.kind == "embeddings" and condition.shape[-1:] != (self.channels,):
            width = condition.shape[-1] if condition.shape else 0
            raise UserError(
                f"the embeddings have {width} channels, the bundle's Summarizer takes "
                f"{self.channels}; embed with the encoder that the bundle was trained with."
            )
        fine = condition.fine_kind if order.guided(self.patch) else ""
        uses_prior = "prior" in (condition.kind, fine)
        has_vector = condition.kind == "prior" or condition.shape
        if uses_prior and (not self.prior or (has_vector and condition.shape != (self.prior,))):
            takes = f"takes {self.prior} values" if self.prior else "has no grid prior"
            raise UserError(
                f"condition {condition.kind}, fine {condition.fine}: the vector has the shape "
                f"{condition.shape}, the bundle {takes}; give a vector of the kind that its prior "
                f"was trained on, or choose another condition."
            )
        if order.source.control and not self.controlnet:
            raise UserError("source.control: the bundle has no ControlNet; leave it out.")
        if order.sampler.small_autoencoder and not self.small:
            raise UserError("sampler.small_autoencoder: the bundle has no vae_small; leave it out.")

    @classmethod
    def of(cls, bundle: Bundle) -> BundleFacts:
        """Return the facts of a loaded bundle."""
        return cls(
            bundle.patch,
            bundle.digest,
            int(bundle.summarizer.config.channels),
            bundle.cdm is not None,
            0 if bundle.prior is None else int(bundle.prior.config.vector),
            bundle.controlnet is not None,
            bundle.vae_small is not None,
            bundle.base_mpp,
        )

    @classmethod
    def read(cls, folder: str) -> BundleFacts:
        """Return the facts of a bundle's folder.

        Raises:
            UserError: there is no bundle, or a part was not trained yet.
        """
        require(folder)
        index = bundle_parts.read_index(folder)
        return cls(
            bundles.patch_of(folder),
            bundles.digest(folder),
            int(bundle_parts.read_config(folder, "summarizer")["channels"]),
            "cdm" in index,
            int(bundle_parts.read_config(folder, "prior")["vector"]) if "prior" in index else 0,
            "controlnet" in index,
            "vae_small" in index,
            bundles.facts(folder).get("base_mpp"),
        )


def require(folder: str) -> None:
    """Refuse a folder without a bundle that can sample.

    Raises:
        UserError: there is none, or a part was not trained yet.
    """
    if not bundle_parts.exists(folder) or not set(bundles.REQUIRED) <= set(
        bundle_parts.read_index(folder)
    ):
        bundles.load(folder)  # fails, and its error says what is missing and how to make it
