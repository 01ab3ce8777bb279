"""Tables in, a part of a bundle out: the autoencoder, the diffusion model, the CDM.

python jobs/train.py model=vae|ldm|cdm data=DIR out=DIR preset=tiny [workers=2] [minutes=2]
ray job submit --working-dir . -- python jobs/train.py model=ldm preset=tiny data=... out=...

Run again, the same command goes on from the newest checkpoint.
"""

from __future__ import annotations

from jobs.presets import TRAIN
from raylarge import report
from raylarge.config import parse
from raylarge.errors import UserError
from raylarge.train.launch import TASKS, Train, train


def main(arguments: list[str]) -> None:
    """Train one model, as the words say."""
    words = dict(word.split("=", 1) for word in arguments if "=" in word)
    if words.get("model") not in TASKS:
        raise UserError(f"say what to train: model= one of {', '.join(TASKS)}.")
    train(parse(Train, arguments, TRAIN[words["model"]]))


if __name__ == "__main__":
    report.entry(main)
