"""The models that can be trained: name -> module of `raylarge/train/tasks`."""

from __future__ import annotations

from types import ModuleType

from raylarge.train.task import DataFacts, Run, SampleSource, TrainTask
from raylarge.train.tasks import cdm, classifier, controlnet, ldm, mil, prior, vae

TASKS: dict[str, ModuleType] = {
    "vae": vae,
    "ldm": ldm,
    "cdm": cdm,
    "prior": prior,
    "controlnet": controlnet,
    "mil": mil,
    "classifier": classifier,
}


def source(run: Run, split: str = "train") -> SampleSource:
    """Return the samples of a split.

    Raises:
        UserError: data that the model cannot be trained on.
    """
    samples: SampleSource = TASKS[run.model].source(run.config, run, split)
    return samples


def build(run: Run, facts: DataFacts) -> TrainTask:
    """Return the task of a run, its weights drawn from the recipe's seed.

    Raises:
        UserError: a bundle or settings that do not fit the data.
    """
    task: TrainTask = TASKS[run.model].build(run.config, run, facts)
    return task
