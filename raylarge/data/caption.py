"""caption: EXAMPLES in, CAPTIONS out: a sentence about each example's image.

The folder's name carries the digest of the captioner, its weights and the scales; another wish
means other CAPTIONS beside these. Batches have one fixed size inside a part, so who captions a
part does not change a word. Scales that are not wanted are left out. Graikos et al. (supplement)
train text-to-large-image models on captions that a captioner gave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from raylarge import images, schema, storage
from raylarge.data import derive, parts, row_selection
from raylarge.data.parts import Stage
from raylarge.data.pipeline import ActorConfig, ExecutorConfig, Facts, without_actors
from raylarge.data.units import DerivedUnit
from raylarge.data.weights import folder_digest
from raylarge.geometry import batches
from raylarge.models import text


@dataclass(frozen=True)
class CaptionConfig(ActorConfig):
    """Who describes the images, and which of them."""

    model: str = "blip"  # a captioner's card (models/text.py)
    weights: str = ""  # a folder in the layout of transformers, on every node. Example: blip/
    batch: int = 8  # images of one pass
    scales: list[int] | None = None
    """Which scales are described; absent: all."""


def run(root: str, config: CaptionConfig, executor: ExecutorConfig) -> Facts:
    """Describe the examples, and write `caption-<digest>.json`.

    Returns:
        What a report wants, and `table`: the folder of the CAPTIONS.

    Raises:
        UserError: `shard` has not run, no such captioner, scales that have no examples, or
            weights that are missing or another model's.
    """
    manifest = parts.manifest(root, "shard", "caption")
    row_selection.require(manifest, config.scales, "caption.scales")
    config = replace(config, weights=config.weights and storage.absolute(config.weights))
    used = _section(config)
    what = {key: value for key, value in used.items() if key != "batch"}
    make_stage = partial(CaptionStage, root, config)
    table = f"captions-{parts.stamp(what)}"
    return derive.run(root, table, make_stage, config.of(executor), {"caption": used})


def _section(config: CaptionConfig) -> dict[str, Any]:
    """What of the config the captions depend on."""
    scales = None if config.scales is None else sorted(set(config.scales))
    weights = folder_digest(config.weights)
    return {**without_actors(config), "scales": scales, "weights": weights}


class CaptionStage(Stage):
    """Makes the CAPTIONS of one part of the examples."""

    kind = schema.CAPTIONS

    def __init__(self, root: str, config: CaptionConfig) -> None:
        """Load the captioner."""
        self._root, self._config = root, config
        self._captioner = text.load_captioner(config.model, config.weights, config.device)

    def make(self, unit: DerivedUnit) -> tuple[pa.Table, Facts]:
        """A sentence for every example of the wanted scales, in the part's order."""
        columns = [*derive.WHERE, "image"]
        table, groups = row_selection.read(self._root, unit, columns, self._config.scales)
        texts = pa.array(self._texts(table["image"]), pa.string())
        return pa.table({**derive.where(table), "text": texts}), {"groups": groups}

    def _texts(self, files: pa.ChunkedArray) -> list[str]:
        texts: list[str] = []
        for batch in batches(len(files), self._config.batch) if len(files) else []:
            pixels = np.stack([images.from_bytes(files[i].as_py()) for i in batch])
            texts += self._captioner.caption(pixels)
        return texts[: len(files)]
