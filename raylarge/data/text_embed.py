"""text_embed: CAPTIONS, a user's table or the images in, VECTORS out: one vector per example.

    captions     (or texts=TABLE)  -text encoder-> vector     what text-to-image learns from
    image=true                     -tile encoder-> vector     CLIP's image tower and its likes
    vectors=TABLE.parquet:COLUMN                -> vector     the user's own, as they are

A user's table is a CSV or parquet with `key` (that of EXAMPLES), or with slide_id, scale, row and
column (`user_table.py`). Rows keep the order of EXAMPLES; an example without a vector has no row.
Vectors are raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from raylarge import images, report, schema, storage, tables
from raylarge.data import derive, parts, row_selection
from raylarge.data.parts import Stage
from raylarge.data.pipeline import ActorConfig, ExecutorConfig, Facts
from raylarge.data.units import DerivedUnit
from raylarge.data.user_table import UserTable, source_of, split_column
from raylarge.data.weights import folder_digest
from raylarge.errors import UserError
from raylarge.geometry import batches
from raylarge.models import ssl, text

Vectors = Float32[np.ndarray, "n width"]
_READERS = 32  # threads: keys lie in many small pieces, and waiting for them takes the time


@dataclass(frozen=True)
class TextEmbedConfig(ActorConfig):
    """Where an example's vector comes from. At most one of texts, image and vectors is set."""

    model: str = "minilm"
    """A text encoder; with `image` a tile encoder, such as clip."""
    weights: str = ""  # a folder (with `image` also a file), on every node. Example: minilm/
    batch: int = 32  # rows of one pass
    captions: str = ""
    """Which CAPTIONS, `captions-<digest>`, where the data folder has several.
    Example: captions-0123abcd."""
    texts: str = ""
    """A table of texts, in a column `text`. Example: texts.csv."""
    image: bool = False
    """Vectors of the images themselves."""
    vectors: str = ""
    """A table of vectors and its column: `vectors.parquet:embedding`.
    Example: vectors.parquet:embedding."""
    missing: str = "refuse"
    """Examples of which the user's table says nothing: `refuse` them, or `drop` their rows."""

    @property
    def kind(self) -> str:
        """Where vectors come from: captions, texts, image or vectors."""
        return next((name for name in _SOURCES if getattr(self, name)), "captions")

    def check(self) -> None:
        """Refuse values that make no sense, or that contradict each other.

        Raises:
            UserError: naming the key, its value and what it may be.
        """
        sources = [name for name in ("captions", *_SOURCES) if getattr(self, name)]
        if len(sources) > 1:
            raise UserError(
                f"text_embed takes one of {' and '.join(sources)}; leave the others out."
            )
        if self.missing not in ("refuse", "drop"):
            raise UserError(f"text_embed.missing={self.missing}: it must be refuse or drop.")


_SOURCES = ("texts", "image", "vectors")


def run(root: str, config: TextEmbedConfig, executor: ExecutorConfig) -> Facts:
    """Give the examples vectors, and write `text_embed-<digest>.json`.

    Returns:
        What a report wants, `table`: the folder of the VECTORS, `missing`: the examples of which
        the user's table says nothing, and `width`.

    Raises:
        UserError: what the vectors are made of has not been made, a table that does not fit or
            lacks examples, no such encoder, or weights that are missing or another model's.
    """
    config.check()
    manifest = parts.manifest(root, "shard", "text_embed")
    absolute: dict[str, Any] = {
        name: storage.absolute(path)
        for name in ("weights", "texts", "vectors")
        if (path := getattr(config, name))
    }
    config = replace(config, **absolute)
    if config.kind == "captions":
        config = replace(config, captions=_captions(root, config.captions))
        manifest = tables.manifest(root, config.captions)
    used = _section(config)
    table = f"vectors-{parts.stamp({k: v for k, v in used.items() if k != 'batch'})}"
    if config.kind in ("texts", "vectors"):
        _refuse(root, manifest, config, table)
    stages: dict[str, Any] = {"image": ImageVectorStage, "vectors": TableVectorStage}
    make_stage = partial(stages.get(config.kind, TextVectorStage), root, config)
    done = derive.run(
        root, table, make_stage, config.of(executor), {"text_embed": used}, manifest["verb"]
    )
    widths = {one["width"] for one in storage.read_json(done["output"])["parts"] if one["rows"]}
    return {**done, "missing": manifest["rows"] - done["rows"], "width": max(widths, default=0)}


def _section(config: TextEmbedConfig) -> dict[str, Any]:
    """What of the config the vectors depend on: files count by their content, not their path.

    `missing` only decides whether there is a table, not what is in it.
    """
    used: dict[str, Any] = {"from": config.kind, "batch": config.batch}
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
        problem = f"{root} has {len(names)} tables of captions"
        cure = (
            f"choose one: text_embed.captions={names[0]} (or {', '.join(names[1:])})."
            if names
            else "run verbs=caption first, or give text_embed.texts=, vectors= or image=true."
        )
        raise UserError(f"{problem}; {cure}")
    return names[0]


def _refuse(root: str, manifest: Mapping[str, Any], config: TextEmbedConfig, table: str) -> None:
    """Refuse a user's table that lacks examples, before anything is made of it.

    Raises:
        UserError: it lacks some and they are to be refused, or all of them; or it lies in such an
            order that it would be read again and again.
    """
    before = tables.read_manifest(root, tables.verb(table))
    fine = config.missing == "drop" or before.get("rows") == manifest["rows"]
    if fine and before.get("input") == manifest["digest"]:
        return
    user_table = _user_table(config)
    for line in user_table.missing_words():
        report.say(line)

    def look(part: Mapping[str, Any]) -> tuple[int, int]:
        rows = user_table.find(row_selection.read(root, _unit(part), ["key"])[0]["key"])
        return int((rows < 0).sum()), user_table.bytes_of(rows[rows >= 0])

    with ThreadPoolExecutor(_READERS) as pool:
        looking = pool.map(look, manifest["parts"])
        looked = list(report.progress(looking, "match", total=len(manifest["parts"]), unit="part"))
    missing = sum(lost for lost, _ in looked)
    if missing == manifest["rows"] or (missing and config.missing == "refuse"):
        cure = "" if missing == manifest["rows"] else ", or leave them out: text_embed.missing=drop"
        part = next(one for one, (lost, _) in zip(manifest["parts"], looked, strict=True) if lost)
        raise UserError(
            f"{user_table.path} has no {user_table.what} for {missing} of "
            f"{manifest['rows']} examples (such as {_lost(root, part, user_table)}); add "
            f"them{cure}."
        )
    user_table.refuse_order(sum(bytes_read for _, bytes_read in looked))


def _unit(part: Mapping[str, Any]) -> DerivedUnit:
    return DerivedUnit(source=part["part"], groups=part["groups"])


def _lost(root: str, part: Mapping[str, Any], user_table: UserTable) -> str:
    """The first example of a part that the user's table lacks, in words."""
    table, _ = row_selection.read(root, _unit(part), ["key", "slide_id", "scale", "row", "column"])
    row = table.filter(pa.array(user_table.find(table["key"]) < 0)).slice(0, 1).to_pylist()[0]
    return ", ".join(f"{name} {value}" for name, value in row.items())


def _user_table(config: TextEmbedConfig) -> UserTable:
    path, column = split_column(config.vectors) if config.vectors else (config.texts, "text")
    return UserTable(path, column, vectors=bool(config.vectors))


class TextVectorStage(Stage):
    """Makes the VECTORS of captions, or of the user's texts."""

    kind = schema.VECTORS

    def __init__(self, root: str, config: TextEmbedConfig) -> None:
        """Load the text encoder, and find the texts."""
        self._root, self._batch = root, config.batch
        self._user_table = _user_table(config) if config.texts else None
        self._encoder = text.load(config.model, config.weights, config.device)

    def make(self, unit: DerivedUnit) -> tuple[pa.Table, Facts]:
        """A vector for every row that has a text, in the part's order."""
        if self._user_table is None:
            table, groups = row_selection.read(self._root, unit, [*derive.WHERE, "text"])
            texts = table["text"].to_pylist()
        else:
            table, groups, rows = matched(self._root, unit, self._user_table)
            texts = self._user_table.texts(rows)
        vectors = np.zeros((len(texts), self._encoder.card.width), np.float32)
        for batch in batches(len(texts), self._batch) if texts else []:
            vectors[list(batch)] = self._encoder([texts[i] for i in batch])
        return _vectors_table(table, vectors, groups)


class ImageVectorStage(Stage):
    """Makes the VECTORS of the examples' images."""

    kind = schema.VECTORS

    def __init__(self, root: str, config: TextEmbedConfig) -> None:
        """Load the tile encoder."""
        self._root, self._batch = root, config.batch
        self._encoder = ssl.load(config.model, config.weights, config.device)

    def make(self, unit: DerivedUnit) -> tuple[pa.Table, Facts]:
        """A vector for every example of the part, in its order."""
        table, groups = row_selection.read(self._root, unit, [*derive.WHERE, "image"])
        files = table["image"]
        vectors = np.zeros((len(files), self._encoder.card.width), np.float32)
        for batch in batches(len(files), self._batch) if len(files) else []:
            pixels = np.stack([images.from_bytes(files[i].as_py()) for i in batch])
            vectors[list(batch)] = self._encoder(pixels)
        return _vectors_table(table, vectors, groups)


class TableVectorStage(Stage):
    """Makes VECTORS of the user's own."""

    kind = schema.VECTORS

    def __init__(self, root: str, config: TextEmbedConfig) -> None:
        """Find what the user's table is about."""
        self._root = root
        self._user_table = _user_table(config)

    def make(self, unit: DerivedUnit) -> tuple[pa.Table, Facts]:
        """The vector of every example that has one, in the part's order."""
        table, groups, rows = matched(self._root, unit, self._user_table)
        return _vectors_table(table, self._user_table.vectors(rows), groups)


def matched(
    root: str, unit: DerivedUnit, user_table: UserTable
) -> tuple[pa.Table, row_selection.Groups, np.ndarray]:
    """The examples of a part that the user's table knows, their groups, and its rows for them."""
    table, groups = row_selection.read(root, unit, derive.WHERE)
    rows = user_table.find(table["key"])
    keep = rows >= 0
    return table.filter(pa.array(keep)), row_selection.kept(groups, keep), rows[keep]


def _vectors_table(
    table: pa.Table, vectors: Vectors, groups: row_selection.Groups
) -> tuple[pa.Table, Facts]:
    """Return the VECTORS of a part and its facts.

    Raises:
        UserError: a vector that is not finite.
    """
    if not np.isfinite(vectors).all():
        key = table["key"][int((~np.isfinite(vectors)).any(axis=1).argmax())].as_py()
        raise UserError(
            f"the vector of example {key} holds NaN or infinity; look at its text or image, or "
            f"choose another text_embed.model."
        )
    count, width = vectors.shape
    offsets = np.arange(count + 1, dtype=np.int32) * width
    column = pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()))
    facts = {"groups": groups, "width": width}
    return pa.table({**derive.where(table), "vector": column}), facts
