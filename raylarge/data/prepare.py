"""The data engine's front: which verbs to run on which slides, and where to."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from raylarge import report, storage
from raylarge.data import embed, encode, shard, tile
from raylarge.data.embed import Embed
from raylarge.data.encode import Encode
from raylarge.data.tile import Tile
from raylarge.errors import UserError
from raylarge.fleet.session import session

VERBS = ("tile", "embed", "shard", "encode")


@dataclass(frozen=True)
class Prepare:
    """What `jobs/prepare.py` understands."""

    out: str = MISSING
    slides: str = ""
    """Paths or patterns, separated by commas."""
    verbs: str = "tile,embed,shard"
    workers: int | None = None
    """Ray workers of one CPU each; absent: this process."""
    bundle: str = ""
    """Whose autoencoder `encode` uses."""
    tile: Tile = field(default_factory=Tile)
    embed: Embed = field(default_factory=Embed)
    encode: Encode = field(default_factory=Encode)


def prepare(config: Prepare, log: report.Report) -> dict[str, dict[str, Any]]:
    """Run the verbs in their order; each is a stage of the report.

    Returns:
        Per verb: rows, counts (scale -> split -> rows), parts, made, output; `encode` also
        `latents`, the folder of its table.

    Raises:
        UserError: whatever the verbs raise, an unknown verb, no slide, no bundle.
    """
    root = storage.absolute(config.out)
    done: dict[str, dict[str, Any]] = {}
    with nullcontext() if config.workers is None else session(config.workers + 1):
        for verb in _verbs(config):
            with log.stage(verb) as facts:
                facts.update(_run(verb, root, config))
            done[verb] = dict(facts)
            news = f"{facts['made']} of {facts['parts']} parts new"
            report.say(f"{verb}: {facts['rows']} rows, {news}")
    return done


def _run(verb: str, root: str, config: Prepare) -> dict[str, Any]:
    workers = config.workers
    if verb == "tile":
        return tile.run(root, find_slides(config.slides), config.tile, workers)
    if verb == "embed":
        return embed.run(root, config.tile, config.embed, workers)
    if verb == "shard":
        return shard.run(root, config.tile, config.embed, workers)
    if not config.bundle:
        raise UserError("encode needs bundle=, the folder that jobs/train.py model=vae wrote.")
    return encode.run(root, storage.absolute(config.bundle), config.encode, workers)


def find_slides(slides: str) -> list[str]:
    """The paths that a comma-separated list of paths and patterns stands for, sorted.

    Raises:
        UserError: nothing given, or a word that fits no file.
    """
    found: set[str] = set()
    for word in filter(None, (word.strip() for word in slides.split(","))):
        paths = storage.listing(storage.absolute(word))
        if not paths:
            raise UserError(f"no slide fits {word}; check the path (a pattern needs quotes).")
        if storage.is_local(word) and any(os.path.isdir(path) for path in paths):
            raise UserError(f"{word} is a folder; name the slides in it: slides='{word}/*.svs'.")
        found.update(paths)
    if not found:
        raise UserError("which slides? Give slides='a.svs,folder/*.tif'.")
    return sorted(found)


def _verbs(config: Prepare) -> list[str]:
    words = [word.strip() for word in config.verbs.split(",") if word.strip()]
    for word in words:
        if word not in VERBS:
            raise UserError(f"there is no verb '{word}'; choose among {', '.join(VERBS)}.")
    return [verb for verb in VERBS if verb in words]
