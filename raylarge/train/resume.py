"""Whether a command goes on with a run, has nothing left to do, or is another one.

What shapes the result stands in ROOT/config.json. Engines and numbers of workers do not: a
checkpoint belongs to none of them (`state.py`).

A record of another version may lack keys and have keys that are gone: a key that is absent means
its default at that time (`ABSENT`, else today's default: a new key's default is the behaviour
before it), and a key that is gone must have the value of today's behaviour (`REMOVED`).
"""

from __future__ import annotations

import json
from typing import Any

from raylarge import config as configuration
from raylarge import report, storage
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models import bundle_parts
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.checkpoint_reader import document
from raylarge.train.config import MODELS, Train
from raylarge.train.history import HISTORY
from raylarge.train.ingest import latents_table
from raylarge.train.task import Run

FREE = {"out", "data", "steps", "minutes", "logs", "checkpoint_every", "checkpoint_minutes"}
FREE |= {"keep", "log_every", "gpu", "patience", "spike", "micro_batch", "workers", "min_workers"}
FREE |= {"resize_s", "strategy", "zero", "offload", "max_failures", "track", "plan", "card"}
FREE |= {"checkpointing", "channels_last", "validate", "sheet_every", "sheet_gpus", "result"}
"""Keys that a resumed run may change."""

ABSENT: dict[str, Any] = {}
"""Dotted keys whose default has changed -> the default that records without the key mean.

`tests/data/train_defaults.json` holds the first default of every key; a test compares.
"""
REMOVED: dict[str, Any] = {}
"""Dotted keys that no longer exist -> their value under which training was as it is now."""
RENAMED: dict[str, str] = {}
"""Dotted keys of older records -> the keys that have their values now."""

CONFIG, LATENTS = "config.json", "latents-"
_NEEDED = {"step", "seconds", "skipped", "loss", "data_digest", "config"}


def told(config: Train) -> dict[str, Any]:
    """The config as JSON holds it, without the other models' parts."""
    values = json.loads(json.dumps(configuration.plain(config)))
    return {k: v for k, v in values.items() if k not in MODELS or k == config.model}


def shareable(config: Train) -> dict[str, Any]:
    """Return the config for the facts of a bundle: it tells no place where things lay."""
    values = {
        key: value for key, value in told(config).items() if key not in bundle_parts.PATH_KEYS
    }
    named: dict[str, Any] = storage.without_folders(values)
    return named


def refuse_mixing(config: Train) -> None:
    """Refuse to go on with a run under values that shape another result.

    Raises:
        UserError: naming the first key that differs, and the cure.
    """
    run = config.run
    path = storage.join(run.folder, CONFIG)
    now = {key: value for key, value in told(config).items() if key not in FREE}
    now |= {"on": stands_on(run)}
    if Checkpoints(run.folder, config.keep).newest() is not None:
        before = _before(path)
        if before["on"] and before["on"] != now["on"]:
            raise UserError(_replaced(run))
        before["on"] = now["on"]  # older records do not name the latents' autoencoder
        if difference := _difference(_recorded(before, config.model), _leaves(now)):
            raise UserError(
                f"{run.folder} was trained {difference} to go on, another out=, or remove that "
                f"folder to begin anew."
            )
    storage.write_json(path, now)


def absent(key: str) -> Any:
    """Return the value that a record without a dotted key means, as JSON holds it."""
    if key in ABSENT:
        return ABSENT[key]
    return _leaves(json.loads(json.dumps(configuration.plain(Train())))).get(key)


def _recorded(before: dict[str, Any], model: str) -> dict[str, Any]:
    """The dotted keys of a record under their names of today, without those that are free."""
    others = {name for name in MODELS if name != model}
    leaves = {RENAMED.get(key, key): value for key, value in _leaves(before).items()}
    return {k: v for k, v in leaves.items() if k.split(".")[0] not in FREE | others}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first key by which two trainings differ, with the cure; empty where none does.

    Args:
        old: dotted keys of a record that may be of another version.
        new: those of the command.
    """
    shown = configuration.format_value
    for key in sorted({*old, *new} - {"model"}):  # the folder's name says the model
        if key not in new:
            if key not in REMOVED or REMOVED[key] != old[key]:
                return f"with {key}={shown(old[key])}, which this version lacks; give that version"
        elif key in old and old[key] != new[key]:
            return f"with {key}={shown(old[key])}, not {shown(new[key])}; give the old value"
        elif key not in old and (then := absent(key)) != new[key]:
            meant = f"{key}={shown(then)}"
            return (
                f"without the key {key}, which means {meant}, not {shown(new[key])}; give {meant}"
            )
    return ""


def refuse_replaced(run: Run) -> None:
    """Refuse to finish a model whose ground was changed while it was trained.

    Raises:
        UserError: naming what was replaced.
    """
    if _before(storage.join(run.folder, CONFIG))["on"] != stands_on(run):
        raise UserError(_replaced(run))


def stands_on(run: Run) -> str:
    """The digest of the bundle's parts that a model is trained on, which stay as they are."""
    ground = _ground(run)
    if ground and not lacking(run):
        return bundles.digest(run.out, ground)
    return latents_table(run.data, run.out)[len(LATENTS) :] if run.model == "ldm" else ""


def lacking(run: Run) -> list[str]:
    """Parts that the model is trained on and the bundle does not have."""
    paths = {name: storage.join(run.out, name, "config.json") for name in _ground(run)}
    return [name for name, path in paths.items() if not storage.exists(path)]


def refuse_lacking(run: Run) -> None:
    """Refuse to train a model before those that it is trained on.

    A diffusion model may come first, on latents that are there already: which autoencoder made
    them is recorded, and one line says what the bundle needs.

    Raises:
        UserError: naming the parts and the commands that make them.
    """
    missing = lacking(run)
    if run.model == "ldm" and missing:
        table = latents_table(run.data, run.out)
        report.say(
            f"{run.out} has no autoencoder: model=ldm is trained on {table} of {run.data}, "
            f"and samples only once that autoencoder is in {storage.join(run.out, 'vae')}."
        )
    elif missing:
        first = "vae" if missing == ["vae"] else "ldm"
        raise UserError(
            f"model={run.model} is trained on {' and '.join(missing)}, which {run.out} does "
            f"not have; run python jobs/train.py model={first} out={run.out} first, or give "
            f"the bundle that has it as out=."
        )


def _ground(run: Run) -> tuple[str, ...]:
    """Parts of the bundle that a model is trained on."""
    return bundles.TRAINED_ON.get(run.name or run.model, ())


def _replaced(run: Run) -> str:
    return (
        f"{' and '.join(_ground(run))} in {run.out}: not what {run.folder} was trained on; bring "
        f"the old back to go on, or remove that folder to begin anew."
    )


def _before(path: str) -> dict[str, Any]:
    """What a run that has checkpoints was trained with.

    Raises:
        UserError: nobody knows.
    """
    before = document(path) if storage.exists(path) else None
    if not isinstance(before, dict) or "on" not in before:
        raise UserError(
            f"{path} does not say what the checkpoints beside it were trained with; bring it back, "
            f"or remove its folder to begin anew."
        )
    return before


def _leaves(values: Any, key: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    if not isinstance(values, dict):
        return {key: values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _leaves(value, f"{key}.{name}" if key else name)
    return found


def finished(run: Run, data: str) -> dict[str, Any] | None:
    """The facts of a run that has nothing left to do.

    Args:
        data: the digest of the rows that there are now.
    """
    root, recipe = run.folder, run.recipe
    path = storage.join(root, "facts.json")
    if not storage.exists(path):
        return None
    facts = document(path)
    if not isinstance(facts, dict) or not facts.keys() >= _NEEDED:
        return None
    newest = Checkpoints(root, recipe.keep).newest()
    if newest is None or newest.facts["step"] != facts["step"] or facts["data_digest"] != data:
        return None
    if facts["config"].get("result", recipe.result) != recipe.result:
        return None
    part = bundles.MAIN_PART.get(run.model, "")
    if part and not _stands(run.out, part):
        return None
    over = recipe.minutes is not None and facts["seconds"] >= recipe.minutes * 60
    facts |= {"bundle": run.out, "loss_csv": storage.join(root, HISTORY)}  # it may be a copy
    return facts if over or facts["step"] >= recipe.steps else None


def _stands(out: str, part: str) -> bool:
    """Whether a part is in a bundle, if it is one, and has its weights."""
    known = bundles.facts(out).get("digests")
    return known is None or (part in known and bool(storage.sizes(storage.join(out, part))))
