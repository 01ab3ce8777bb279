"""text_embed: CAPTIONS, a user's table or the images in, VECTORS out: one vector per example.

    captions     (or texts=TABLE)  -text encoder-> vector     what text-to-image learns from
    image=true                     -tile encoder-> vector     CLIP's image tower and its likes
    vectors=TABLE.parquet:COLUMN                -> vector     the user's own, as they are

A user's table is a CSV or parquet with `key` (that of EXAMPLES), or with slide_id, scale, row and
column. Rows keep the order of EXAMPLES; an example without a vector has no row. Vectors are raw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from raylarge import images, schema, storage, tables
from raylarge.data import derive, parts, picked
from raylarge.data.caption import folder_digest
from raylarge.data.given import Given, source_of, split_column
from raylarge.data.parts import Maker
from raylarge.data.pipeline import Crew, Facts, Unit
from raylarge.errors import UserError
from raylarge.geometry import batches
from raylarge.models import ssl, text

Vectors = Float32[np.ndarray, "n width"]


@dataclass(frozen=True)
class TextEmbed:
    """Where an example's vector comes from. At most one of texts, image and vectors is set."""

    model: str = "minilm"
    """A text encoder; with `image` a tile encoder, such as clip."""
    weights: str = ""  # a folder (with `image` also a file), on every node
    batch: int = 32
    captions: str = ""
    """Which CAPTIONS, `captions-<digest>`, where the data folder has several."""
    texts: str = ""
    """A table of texts, in a column `text`."""
    image: bool = False
    """Vectors of the images themselves."""
    vectors: str = ""
    """A table of vectors and its column: `vectors.parquet:embedding`."""
    missing: str = "refuse"
    """Examples of which the user's table says nothing: `refuse` them, or `drop` their rows."""
    actors: int | None = None
    """Ray actors; absent: `workers`."""
    gpus: float = 0.0
    """Of each actor; a part of one lets several share it."""

    @property
    def kind(self) -> str:
        """Where vectors come from: captions, texts, image or vectors."""
        return next((name for name in _GIVEN if getattr(self, name)), "captions")

    def check(self) -> None:
        """Refuse values that make no sense, or that contradict each other.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        told = [name for name in ("captions", *_GIVEN) if getattr(self, name)]
        if len(told) > 1:
            raise UserError(f"text_embed takes one of {' and '.join(told)}; leave the others out.")
        if self.missing not in ("refuse", "drop"):
            raise UserError(f"text_embed.missing={self.missing}: it must be refuse or drop.")
        if self.batch < 1:
            raise UserError(f"text_embed.batch={self.batch}: it must be 1 or more.")


_GIVEN = ("texts", "image", "vectors")


def run(root: str, config: TextEmbed, crew: Crew) -> Facts:
    """Give the examples vectors, and write `text_embed-<digest>.json`.

    Returns:
        What a report wants, `table`: the folder of the VECTORS, `missing`: the examples of which
        the user's table says nothing, and `width`.

    Raises:
        UserError: what the vectors are made of has not been made, a table that does not fit or
            lacks examples, no such encoder, or weights that are missing or another model's.
    """
    config.check()
    made = parts.manifest(root, "shard", "text_embed")
    absolute: dict[str, Any] = {
        name: storage.absolute(path)
        for name in ("weights", "texts", "vectors")
        if (path := getattr(config, name))
    }
    config = replace(config, **absolute)
    if config.kind == "captions":
        config = replace(config, captions=_captions(root, config.captions))
        made = tables.manifest(root, config.captions)
    used = _section(config)
    missing = _missing(root, made, config) if config.kind in ("texts", "vectors") else 0
    makers: dict[str, Any] = {"image": OfImages, "vectors": OfTable}
    maker = partial(makers.get(config.kind, OfTexts), root, config)
    table = f"vectors-{parts.stamp({k: v for k, v in used.items() if k not in _ROWS})}"
    crew = picked.crew_of(crew, config.actors, config.gpus)
    done = derive.run(root, table, maker, crew, {"text_embed": used}, made["verb"])
    widths = {one["width"] for one in storage.read_json(done["output"])["parts"] if one["rows"]}
    return {**done, "missing": missing, "width": max(widths, default=0)}


_ROWS = ("batch", "missing")
"""What of the config changes which rows there are, or their last bits, but not what they mean."""


def _section(config: TextEmbed) -> dict[str, Any]:
    """What of the config the vectors depend on: files count by their content, not their path."""
    used: dict[str, Any] = {"from": config.kind, "batch": config.batch, "missing": config.missing}
    if config.kind == "vectors":
        path, column = split_column(config.vectors)
        return {**used, "vectors": source_of(path), "column": column}
    if config.kind == "image":
        weights = ssl.weights_digest(ssl.card(config.model), config.weights)
    else:
        weights = folder_digest(config.weights)
    used.update(model=config.model, weights=weights)
    if config.kind == "texts":
        used["texts"] = source_of(config.texts)
    elif config.kind == "captions":
        used["captions"] = config.captions
    return used


def _captions(root: str, name: str) -> str:
    """The CAPTIONS that are meant: those named, or the only ones there are.

    Raises:
        UserError: there are none, or several and no name.
    """
    if name:
        return name if name.startswith("captions-") else f"captions-{name}"
    verbs = [path.rsplit("/", 1)[-1] for path in storage.children(root, "caption-*.json")]
    names = ["captions-" + verb.removeprefix("caption-").removesuffix(".json") for verb in verbs]
    if len(names) != 1:
        told = f"{root} has {len(names)} tables of captions"
        cure = (
            f"choose one: text_embed.captions={names[0]} (or {', '.join(names[1:])})."
            if names
            else "run verbs=caption first, or give text_embed.texts=, vectors= or image=true."
        )
        raise UserError(f"{told}; {cure}")
    return names[0]


def _missing(root: str, made: dict[str, Any], config: TextEmbed) -> int:
    """How many examples the user's table says nothing of.

    Raises:
        UserError: there are some and they are to be refused, or there are no others.
    """
    given = _given(config)
    missing, example = 0, ""
    for part in made["parts"]:
        unit = {"source": part["part"], "groups": part["groups"]}
        table, _ = picked.read(root, unit, ["key", "slide_id", "scale", "row", "column"])
        lost = table.filter(pa.array(given.find(table["key"]) < 0))
        if lost.num_rows and not example:
            example = ", ".join(f"{name} {value}" for name, value in lost.to_pylist()[0].items())
        missing += lost.num_rows
    if missing == made["rows"] or (missing and config.missing == "refuse"):
        cure = "" if missing == made["rows"] else ", or leave them out: text_embed.missing=drop"
        raise UserError(
            f"{given.path} has no {given.what} for {missing} of {made['rows']} examples (such as "
            f"{example}); add them{cure}."
        )
    return missing


def _given(config: TextEmbed) -> Given:
    path, column = split_column(config.vectors) if config.vectors else (config.texts, "text")
    return Given(path, column, vectors=bool(config.vectors))


class OfTexts(Maker):
    """Makes the VECTORS of captions, or of the user's texts."""

    kind = schema.VECTORS

    def __init__(self, root: str, config: TextEmbed) -> None:
        """Load the text encoder, and the texts."""
        self._root, self._batch = root, config.batch
        self._given = _given(config) if config.texts else None
        device = "cuda" if config.gpus else "cpu"
        self._encoder = text.load(config.model, config.weights, device)

    def make(self, unit: Unit) -> tuple[pa.Table, Facts]:
        """A vector for every row that has a text, in the part's order."""
        if self._given is None:
            table, groups = picked.read(self._root, unit, [*derive.WHERE, "text"])
            texts = table["text"].to_pylist()
        else:
            table, groups, found = matched(self._root, unit, self._given)
            texts = self._given.values.take(pa.array(found)).to_pylist()
        vectors = np.zeros((len(texts), self._encoder.card.width), np.float32)
        for batch in batches(len(texts), self._batch) if texts else []:
            vectors[list(batch)] = self._encoder([texts[i] for i in batch])
        return _made(table, vectors, groups)


class OfImages(Maker):
    """Makes the VECTORS of the examples' images."""

    kind = schema.VECTORS

    def __init__(self, root: str, config: TextEmbed) -> None:
        """Load the tile encoder."""
        self._root, self._batch = root, config.batch
        device = "cuda" if config.gpus else "cpu"
        self._encoder = ssl.load(config.model, config.weights, device)

    def make(self, unit: Unit) -> tuple[pa.Table, Facts]:
        """A vector for every example of the part, in its order."""
        table, groups = picked.read(self._root, unit, [*derive.WHERE, "image"])
        files = table["image"]
        vectors = np.zeros((len(files), self._encoder.card.width), np.float32)
        for batch in batches(len(files), self._batch) if len(files) else []:
            pixels = np.stack([images.from_bytes(files[i].as_py()) for i in batch])
            vectors[list(batch)] = self._encoder(pixels)
        return _made(table, vectors, groups)


class OfTable(Maker):
    """Makes VECTORS of the user's own."""

    kind = schema.VECTORS

    def __init__(self, root: str, config: TextEmbed) -> None:
        """Read the user's table."""
        self._root = root
        self._given = _given(config)

    def make(self, unit: Unit) -> tuple[pa.Table, Facts]:
        """The vector of every example that has one, in the part's order."""
        table, groups, found = matched(self._root, unit, self._given)
        return _made(table, self._given.vectors[found], groups)


def matched(root: str, unit: Unit, given: Given) -> tuple[pa.Table, picked.Groups, np.ndarray]:
    """The examples of a part that the user's table knows, their groups, and its rows for them."""
    table, groups = picked.read(root, unit, derive.WHERE)
    found = given.find(table["key"])
    keep = found >= 0
    return table.filter(pa.array(keep)), picked.kept(groups, keep), found[keep]


def _made(table: pa.Table, vectors: Vectors, groups: picked.Groups) -> tuple[pa.Table, Facts]:
    count, width = vectors.shape
    offsets = np.arange(count + 1, dtype=np.int32) * width
    column = pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()))
    facts = {"groups": groups, "width": width}
    return pa.table({**derive.where(table), "vector": column}), facts
