"""Whether a command goes on with a run, has nothing left to do, or is another one.

What shapes the result stands in ROOT/config.json. Engines and numbers of workers do not: a
checkpoint belongs to none of them (`state.py`).
"""

from __future__ import annotations

import json
from typing import Any

from raylarge import config as configuration
from raylarge import storage
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models import parts
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.journal import HISTORY
from raylarge.train.settings import MODELS, Train

FREE = {"out", "data", "steps", "minutes", "logs", "checkpoint_every", "checkpoint_minutes"}
FREE |= {"keep", "log_every", "gpu", "patience", "spike", "micro_batch", "workers", "min_workers"}
FREE |= {"resize_s", "strategy", "zero", "offload", "max_failures", "track", "plan", "card"}
FREE |= {"checkpointing", "channels_last", "validate", "sheet_every", "sheet_gpus", "result"}
"""Keys that a resumed run may change."""


CONFIG = "config.json"
_NEEDED = {"step", "seconds", "skipped", "loss", "data_digest", "config"}


def told(config: Train) -> dict[str, Any]:
    """The config as JSON holds it, without the other models' parts."""
    values = json.loads(json.dumps(configuration.plain(config)))
    return {k: v for k, v in values.items() if k not in MODELS or k == config.model}


def shareable(config: Train) -> dict[str, Any]:
    """Return the config for the facts of a bundle: it tells no place where things lay."""
    values = {key: value for key, value in told(config).items() if key not in parts.PLACES}
    named: dict[str, Any] = storage.without_places(values)
    return named


def refuse_mixing(config: Train, root: str) -> None:
    """Refuse to go on with a run under values that shape another result.

    Raises:
        UserError: naming the first key that differs, and the cure.
    """
    path = storage.join(root, CONFIG)
    now = {key: value for key, value in told(config).items() if key not in FREE}
    now |= {"on": stands_on(config)}
    if Checkpoints(root, config.keep).newest() is not None:
        before = _before(path)
        if before["on"] != now["on"]:
            raise UserError(_replaced(config, root))
        old, new = _leaves(before), _leaves(now)
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{root} was trained with {key}={old.get(key)}, not {new.get(key)}; give "
                    f"the old value to go on, another out=, or remove that folder to begin anew."
                )
    storage.write_json(path, now)


def refuse_replaced(config: Train, root: str) -> None:
    """Refuse to finish a model whose ground was changed while it was trained.

    Raises:
        UserError: naming what was replaced.
    """
    if _before(storage.join(root, CONFIG))["on"] != stands_on(config):
        raise UserError(_replaced(config, root))


def stands_on(config: Train) -> str:
    """The digest of the bundle's parts that a model is trained on, which stay as they are."""
    ground = _ground(config)
    whole = all(storage.exists(storage.join(config.out, name, "config.json")) for name in ground)
    return bundles.digest(config.out, ground) if ground and whole else ""


def _ground(config: Train) -> tuple[str, ...]:
    """Parts of the bundle that a model is trained on."""
    small = config.model == "vae" and config.vae.distill
    return bundles.ON.get("vae_small" if small else config.model, ())


def _replaced(config: Train, root: str) -> str:
    return (
        f"{' and '.join(_ground(config))} in {config.out}: not what {root} was trained on; bring "
        f"the old back to go on, or remove that folder to begin anew."
    )


def _before(path: str) -> dict[str, Any]:
    """What a run that has checkpoints was trained with.

    Raises:
        UserError: nobody knows.
    """
    before = storage.read_json(path) if storage.exists(path) else None
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


def finished(config: Train, root: str, data: str) -> dict[str, Any] | None:
    """The facts of a run that has nothing left to do.

    Args:
        data: the digest of the rows that there are now.
    """
    path = storage.join(root, "facts.json")
    if not storage.exists(path):
        return None
    facts = storage.read_json(path)
    if not isinstance(facts, dict) or not facts.keys() >= _NEEDED:
        return None
    newest = Checkpoints(root, config.keep).newest()
    if newest is None or newest.facts["step"] != facts["step"] or facts["data_digest"] != data:
        return None
    if facts["config"].get("result", config.result) != config.result:
        return None
    part = bundles.MADE.get(config.model, "")
    if part and not _stands(config.out, part):
        return None
    over = config.minutes is not None and facts["seconds"] >= config.minutes * 60
    facts |= {"bundle": config.out, "loss_csv": storage.join(root, HISTORY)}  # it may be a copy
    return facts if over or facts["step"] >= config.steps else None


def _stands(out: str, part: str) -> bool:
    """Whether a part is in a bundle, if it is one, and has its weights."""
    known = bundles.facts(out).get("digests")
    return known is None or (part in known and bool(storage.sizes(storage.join(out, part))))
