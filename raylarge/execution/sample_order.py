"""The order that the keys of a sampling job describe: `order.*`, a text, an image or a region.

Keys that exclude each other, and keys that say nothing without another one, are refused: what a
user typed is never ignored.
"""

from __future__ import annotations

import base64

from raylarge import storage, uploads
from raylarge.errors import UserError
from raylarge.execution.config import SampleConfig
from raylarge.execution.reference import Region, find_region
from raylarge.geometry import Patch
from raylarge.order import Condition, Order

_OF_TEXT = ("fine", "draw", "prior_guidance", "prior_steps")
"""Settings of `order.condition` that stay where a text decides the rest."""


def read_order(config: SampleConfig, patch: Patch) -> tuple[Order, Region | None]:
    """Return the order of a job, and the region that its `reference` names, if it names one.

    Args:
        config: of the job.
        patch: the sizes of the bundle.

    Raises:
        UserError: an order, an image or a reference that cannot be read, or keys that exclude
            each other.
    """
    _require_partners(config)
    order = _with_image(config) if config.image else config.order
    if config.text:
        return order.replace(condition=_of_text(config, order.condition)), None
    if not config.reference:
        return order, None
    if order.count:
        raise UserError("reference= conditions one large image: leave out order.count.")
    region = find_region(storage.absolute(config.reference), config.at, order, patch)
    return order.replace(condition=Condition.of(region.grid)), region


def _require_partners(config: SampleConfig) -> None:
    """Refuse keys of which another one would make nothing.

    Raises:
        UserError: naming them and the cure.
    """
    condition = config.order.condition
    filled_in = {"draw"} if condition.draw == config.order.recipe else set()
    keys = condition.model_fields_set - filled_in
    ignored = sorted(keys - {*_OF_TEXT, "kind"})
    ignored += ["kind"] if keys >= {"kind"} and condition.kind != "prior" else []
    rules = (
        (config.at is not None and not config.reference, "at= places a region: give reference=."),
        (config.negative and not config.text, "negative= goes with text=: give text=, too."),
        (
            config.text and config.reference,
            "text= and reference= are two conditions of one image: leave out one of them.",
        ),
        (
            config.reference and keys,
            "reference= is the condition of the image: leave out order.condition.kind and the "
            "other settings of order.condition.",
        ),
        (
            config.text and ignored,
            f"text= is the condition of the image: leave out order.condition."
            f"{', order.condition.'.join(ignored)}.",
        ),
    )
    for broken, message in rules:
        if broken:
            raise UserError(message)


def _with_image(config: SampleConfig) -> Order:
    """Return the order with the image that is made larger, and the size that follows.

    Raises:
        UserError: an image that cannot be read, or an algorithm that takes none.
    """
    order = config.order
    if order.algorithm != "superres":
        raise UserError(
            f"image= is made larger by order.algorithm=superres, not {order.algorithm}: leave "
            "out order.algorithm or image=."
        )
    content = storage.read_bytes(storage.absolute(config.image))
    source = order.source.replace(image=base64.b64encode(content).decode())
    rows, columns = uploads.read(content, f"image={config.image}").shape[:2]
    size = f"{rows << source.octaves}x{columns << source.octaves}"
    size = order.size if "size" in order.model_fields_set else size
    return order.replace(size=size, source=source)


def _of_text(config: SampleConfig, condition: Condition) -> Condition:
    """Return the condition of a text, and perhaps against another."""
    from raylarge.models import text

    encoder = text.load(config.text_encoder, config.text_weights)
    vectors = encoder([config.text, config.negative])
    vector = Condition.of_vector(vectors[0], vectors[1] if config.negative else None)
    return vector.replace(**{name: getattr(condition, name) for name in _OF_TEXT})
