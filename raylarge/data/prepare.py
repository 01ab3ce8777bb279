"""The data engine's front: which verbs to run on which slides, and where to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from glob import has_magic
from typing import Any

from omegaconf import MISSING

from raylarge import report, storage
from raylarge.compute.session import session
from raylarge.config import require_place
from raylarge.data import caption, embed, encode, features, shard, text_embed, tile
from raylarge.data.caption import CaptionConfig
from raylarge.data.embed_config import EmbedConfig
from raylarge.data.encode import EncodeConfig
from raylarge.data.features import FeatureConfig
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.shard import ShardConfig
from raylarge.data.slide_index import with_names
from raylarge.data.text_embed import TextEmbedConfig
from raylarge.data.tile_candidates import TileConfig
from raylarge.data.tile_table import file_names
from raylarge.errors import UserError
from raylarge.storage import web

VERBS = ("tile", "embed", "shard", "encode", "caption", "text_embed", "features")


@dataclass(frozen=True)
class Prepare:
    """What `jobs/prepare.py` understands."""

    out: str = MISSING  # the data folder, for all tables. Example: data
    slides: str = ""
    """Paths or patterns, separated by commas. Example: slides/*.svs,b.tif."""
    verbs: str = "tile,embed,shard"
    """what to do: tile, embed, shard, encode, caption, text_embed, features."""
    workers: int | None = None
    """Ray workers of one CPU each; absent: this process."""
    on_error: str = "stop"
    """At a slide that cannot be read: `stop`, or `skip` it and say so in failed.parquet."""
    names: bool = False
    """Name the files of slides in the terminal, the QC page and report.json, not only by
    pseudonyms."""
    bundle: str = ""
    """Whose autoencoder `encode` uses, and whose U-Net `features`. Example: bundle."""
    tile: TileConfig = field(default_factory=TileConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    text_embed: TextEmbedConfig = field(default_factory=TextEmbedConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)


def prepare(config: Prepare, log: report.Report) -> dict[str, dict[str, Any]]:
    """Run the verbs in their order; each is a stage of the report.

    Returns:
        Per verb: rows, counts (scale -> split -> rows), failed, parts, made, again, tiles, output;
        of a verb after `shard` also `table`, the folder of what it made.

    Raises:
        UserError: whatever the verbs raise, an unknown verb, no slide, no bundle.
    """
    if config.on_error not in ("stop", "skip"):
        raise UserError(f"on_error={config.on_error}: it must be stop or skip.")
    require_place("out", config.out)
    root = storage.absolute(config.out)
    executor = ExecutorConfig(workers=config.workers, skip=config.on_error == "skip")
    if config.slides and "tile" not in _verbs(config):  # queries of web addresses are not stored
        for path in find_slides(config.slides):
            web.remember_url(path)
    try:
        with storage.exclusive(root, "prepare") as check:
            log.read()
            return _run_all(root, config, log, executor, check)
    except UserError as error:
        if not config.names:
            raise
        raise type(error)(with_names(str(error), file_names(root))) from error


def _run_all(
    root: str,
    config: Prepare,
    log: report.Report,
    executor: ExecutorConfig,
    check: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """The verbs one after the other, as long as the folder is ours (`check`)."""
    done: dict[str, dict[str, Any]] = {}
    with nullcontext() if config.workers is None else session(config.workers + 1):
        for verb in _verbs(config):
            check()
            with log.stage(verb) as facts:
                start = time.monotonic()
                facts.update(_run(verb, root, config, executor))
                if facts["tiles"]:
                    facts["tiles_per_s"] = round(facts["tiles"] / (time.monotonic() - start), 1)
                done[verb] = dict(facts)
                facts.update(storage.without_folders(done[verb]))  # the report goes with the data
            report.say(_line(verb, facts))
            if facts["failed"]:
                _say_failures(root, verb, config.names)
    return done


def _say_failures(root: str, verb: str, names: bool) -> None:
    """A line for each slide that failed; by pseudonym, and by file name where that is wanted."""
    files = file_names(root) if names else {}
    for row in storage.read_table(storage.join(root, "failed.parquet")).to_pylist():
        if row["verb"] == verb:
            report.say(f"  {with_names(row['reason'], files)}")
    if not names:
        report.say("  (names=true shows the names of their files here)")


def _line(verb: str, facts: dict[str, Any]) -> str:
    failed = f", {facts['failed']} failed: see failed.parquet" if facts["failed"] else ""
    again = f", {facts['again']} begun again after workers died" if facts["again"] else ""
    new = f"{facts['made']} of {facts['parts']} parts new"
    return f"{verb}: {facts['rows']} rows, {new}{again}{failed}"


def _run(verb: str, root: str, config: Prepare, executor: ExecutorConfig) -> dict[str, Any]:
    if verb == "tile":
        return tile.run(root, find_slides(config.slides), config.tile, executor, config.names)
    if verb == "embed":
        return embed.run(root, config.tile, config.embed, executor)
    if verb == "shard":
        return shard.run(root, config.tile, config.embed, config.shard, executor)
    if verb == "caption":
        return caption.run(root, config.caption, executor)
    if verb == "text_embed":
        return text_embed.run(root, config.text_embed, executor)
    if not config.bundle:
        wrote = "model=vae" if verb == "encode" else "model=ldm"
        raise UserError(f"{verb} needs bundle=, the folder that jobs/train.py {wrote} wrote.")
    require_place("bundle", config.bundle)
    bundle = storage.absolute(config.bundle)
    if verb == "encode":
        return encode.run(root, bundle, config.encode, executor)
    return features.run(root, bundle, config.features, executor)


def find_slides(slides: str) -> list[str]:
    """The paths that a comma-separated list of paths and patterns stands for, sorted.

    Raises:
        UserError: nothing given, or a word that fits no file.
    """
    slide_paths: set[str] = set()
    for word in filter(None, (word.strip() for word in slides.split(","))):
        paths = storage.glob(storage.absolute(word))
        if not paths:
            raise UserError(f"no slide fits {word}; check the path (a pattern needs quotes).")
        named = storage.is_local(word) and not has_magic(word)
        folders = [path for path in paths if named and os.path.isdir(path)]
        if any(not storage.children(folder, "*.dcm") for folder in folders):
            raise UserError(
                f"{folders[0]} is a folder; name the slides in it: slides='{folders[0]}/*.svs'."
            )
        slide_paths.update(paths)
    if not slide_paths:
        raise UserError("which slides? Give slides='a.svs,folder/*.tif'.")
    return sorted(slide_paths)


def _verbs(config: Prepare) -> list[str]:
    words = [word.strip() for word in config.verbs.split(",") if word.strip()]
    for word in words:
        if word not in VERBS:
            raise UserError(f"there is no verb '{word}'; choose among {', '.join(VERBS)}.")
    if not words:
        raise UserError(f"verbs={config.verbs} names no verb; choose among {', '.join(VERBS)}.")
    return [verb for verb in VERBS if verb in words]
