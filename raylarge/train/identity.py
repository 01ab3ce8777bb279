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
from raylarge.train.checkpoint import Checkpoints
from raylarge.train.settings import MODELS, Train

FREE = {"out", "data", "steps", "minutes", "logs", "checkpoint_every", "checkpoint_minutes"}
FREE |= {"keep", "log_every", "gpu", "patience", "spike", "micro_batch", "workers", "min_workers"}
FREE |= {"resize_s", "strategy", "zero", "offload", "max_failures", "track", "plan", "card"}
FREE |= {"checkpointing", "channels_last", "validate", "sheet_every", "sheet_gpus", "result"}
"""Keys that a resumed run may change."""


PARTS = {"ldm": "unet", "cdm": "cdm", "prior": "prior", "controlnet": "controlnet"}
"""The part that a model becomes."""
ON = {
    "vae": ("vae",),
    "ldm": ("vae",),
    "cdm": ("summarizer",),
    "controlnet": ("unet", "summarizer"),
}
"""Parts of the bundle that a model is trained on."""


def told(config: Train) -> dict[str, Any]:
    """The config as JSON holds it, without the other models' parts."""
    values = json.loads(json.dumps(configuration.plain(config)))
    return {k: v for k, v in values.items() if k not in MODELS or k == config.model}


def refuse_mixing(config: Train, root: str) -> None:
    """Refuse to go on with a run under values that shape another result.

    Raises:
        UserError: naming the first key that differs, and the cure.
    """
    path = storage.join(root, "config.json")
    now = {key: value for key, value in told(config).items() if key not in FREE}
    now |= {"on": stands_on(config)}
    if storage.exists(path) and Checkpoints(root, config.keep).newest() is not None:
        before = storage.read_json(path)
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                if key == "on":
                    raise UserError(
                        f"the {' and '.join(ON[config.model])} in {config.out} were replaced since "
                        f"{root} was trained on them; remove that folder to begin anew."
                    )
                raise UserError(
                    f"{root} was trained with {key}={before.get(key)}, not {now.get(key)}; give "
                    f"the old value to go on, another out=, or remove that folder to begin anew."
                )
    storage.write_json(path, now)


def stands_on(config: Train) -> str:
    """The digest of the bundle's parts that a model is trained on, which stay as they are."""
    distilled = config.model == "vae" and config.vae.distill
    parts = () if config.model == "vae" and not distilled else ON.get(config.model, ())
    whole = all(storage.exists(storage.join(config.out, name, "config.json")) for name in parts)
    return bundles.digest(config.out, parts) if parts and whole else ""


def finished(config: Train, root: str, data: str) -> dict[str, Any] | None:
    """The facts of a run that has nothing left to do.

    Args:
        data: the digest of the rows that there are now.
    """
    path = storage.join(root, "facts.json")
    if not storage.exists(path):
        return None
    facts: dict[str, Any] = storage.read_json(path)
    newest = Checkpoints(root, config.keep).newest()
    if newest is None or newest.facts["step"] != facts["step"] or facts["data_digest"] != data:
        return None
    if facts["config"]["result"] != config.result:
        return None
    part = PARTS.get(config.model, "")
    if part and part not in bundles.facts(config.out).get("digests", {part: ""}):
        return None
    over = config.minutes is not None and facts["seconds"] >= config.minutes * 60
    return facts if over or facts["step"] >= config.steps else None
