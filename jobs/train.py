"""Tables in, a part of a bundle out: the autoencoder, the diffusion model, the CDM and others.

python jobs/train.py model=vae|ldm|cdm data=DIR out=DIR preset=tiny [workers=2] [minutes=2]
python jobs/train.py model=ldm preset=brca [data=DIR out=DIR] workers=8 plan=true
python jobs/train.py model=mil data=DIR out=DIR mil.label=subtype mil.fold=-1
ray job submit --working-dir . -- python jobs/train.py model=ldm preset=tiny data=... out=...

Run again, the same command goes on from the newest checkpoint.
"""

from __future__ import annotations

from dataclasses import replace

from jobs.presets import PRESETS, TRAIN, overrides
from raylarge import report
from raylarge.config import nearest, parse, show_help, wants_help
from raylarge.errors import UserError
from raylarge.train.config import MODELS
from raylarge.train.launch import Train, plan, train, train_folds


def main(arguments: list[str]) -> None:
    """Train one model, or plan it, as the words say."""
    if wants_help(arguments):
        _help(arguments)
    words = dict(word.split("=", 1) for word in arguments if "=" in word)
    model, preset = words.get("model"), words.get("preset")
    if model not in MODELS:
        meant = nearest(model or "", MODELS)
        hint = f"did you mean model={meant}? They are" if meant else "choose one of"
        given = "model= is not given" if model is None else f"there is no model '{model}'"
        raise UserError(f"{given}; {hint}: {', '.join(MODELS)}.")
    if words.get("plan") == "true":
        arguments = [*(f"{key}=" for key in ("data", "out") if key not in words), *arguments]
    config = parse(Train, arguments, {} if preset is None else {preset: overrides(model, preset)})
    folds = model == "mil" and config.mil.fold < 0
    if config.plan:
        report.say(plan(replace(config, mil=replace(config.mil, fold=0)) if folds else config))
    elif folds:
        train_folds(config)
    else:
        train(config)


def _help(arguments: list[str]) -> None:
    """Print the keys of one model, or those of all models and which models there are."""
    model = next((word[6:] for word in arguments if word.startswith("model=")), "")
    general = [name for name in MODELS if name != model]
    if model in MODELS:
        show_help(__doc__, {f"model={model}": Train}, TRAIN.get(model, {}), general)
    head = f"{__doc__}\nThe models, each with keys of its own: "
    listed = "\n".join(f"  python jobs/train.py model={name} --help" for name in MODELS)
    show_help(f"{head}\n{listed}", {"": Train}, PRESETS, general)


if __name__ == "__main__":
    report.entry(main)
