"""The order that the keys of a sampling job describe: `order.*`, a text, an image or a region.

Keys that exclude each other, and keys that say nothing without another one, are refused: what a
user typed is never ignored.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from raylarge import config as configuration
from raylarge import order as orders
from raylarge import storage, uploads
from raylarge.errors import UserError
from raylarge.execution.reference import Region, find_region
from raylarge.geometry import Patch
from raylarge.order import Condition, Order

if TYPE_CHECKING:
    from raylarge.execution.sample import Sample

_OF_TEXT = ("fine", "draw", "prior_guidance", "prior_steps")
"""Settings of `order.condition` that stay where a text decides the rest."""


def read_order(config: Sample, patch: Patch) -> tuple[Order, Region | None]:
    """Return the order of a job, and the region that its `reference` names, if it names one.

    Args:
        config: of the job.
        patch: the sizes of the bundle.

    Raises:
        UserError: an order, an image or a reference that cannot be read, or keys that exclude
            each other.
    """
    _require_partners(config)
    order = orders.parse(_with_image(config) if config.image else config.order)
    if config.text:
        return replace(order, condition=_of_text(config, order.condition)), None
    if not config.reference:
        return order, None
    if order.count:
        raise UserError("reference= conditions one large image: leave out order.count.")
    region = find_region(storage.absolute(config.reference), _place(config.at), order, patch)
    return replace(order, condition=Condition.of(region.grid)), region


def _require_partners(config: Sample) -> None:
    """Refuse keys of which another one would make nothing.

    Raises:
        UserError: naming them and the cure.
    """
    condition = config.order.get("condition", {})
    condition = condition if isinstance(condition, Mapping) else {}
    ignored = sorted(set(condition) - {*_OF_TEXT} - {"kind"})
    ignored += ["kind"] if condition.get("kind", "prior") != "prior" else []
    rules = (
        (config.at is not None and not config.reference, "at= places a region: give reference=."),
        (config.negative and not config.text, "negative= goes with text=: give text=, too."),
        (
            config.text and config.reference,
            "text= and reference= are two conditions of one image: leave out one of them.",
        ),
        (
            config.reference and "condition" in config.order,
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


def _with_image(config: Sample) -> dict[str, Any]:
    """Return the order's values with the image that is made larger, and the size that follows.

    Raises:
        UserError: an image that cannot be read, or an algorithm that takes none.
    """
    values = {"algorithm": "superres", **config.order}
    if values["algorithm"] != "superres":
        raise UserError(
            f"image= is made larger by order.algorithm=superres, not {values['algorithm']}: leave "
            "out order.algorithm or image=."
        )
    content = storage.read_bytes(storage.absolute(config.image))
    source = {"octaves": orders.Source().octaves, **values.get("source", {})}
    source["image"] = base64.b64encode(content).decode()
    rows, columns = uploads.read(content, f"image={config.image}").shape[:2]
    factor = 1 << min(30, max(0, orders.parse({"source": source}).source.octaves))
    return {"size": f"{rows * factor}x{columns * factor}", **values, "source": source}


def _of_text(config: Sample, condition: Condition) -> Condition:
    """Return the condition of a text, and perhaps against another."""
    from raylarge.models import text

    encoder = text.load(config.text_encoder, config.text_weights)
    vectors = encoder([config.text, config.negative])
    vector = Condition.of_vector(vectors[0], vectors[1] if config.negative else None)
    return replace(vector, **{name: getattr(condition, name) for name in _OF_TEXT})


def _place(at: Any) -> tuple[int, int] | None:
    """Return row and column of `at=row,column`; None where it is not set.

    Raises:
        UserError: not two whole numbers.
    """
    if at is None:
        return None
    parts = at.split(",") if isinstance(at, str) and not at.startswith("[") else at
    try:
        row, column = configuration.read(tuple[int, int], parts)
    except ValueError as error:
        raise UserError(
            f"at={configuration.format_value(at)} is not a row and a column such as at=3,5."
        ) from error
    return row, column
