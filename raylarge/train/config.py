"""What `train` is told: the recipe, the model's own config, where things lie, who works."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from raylarge import config as configuration
from raylarge import storage
from raylarge.errors import UserError
from raylarge.train.estimate.model_states import WorkerGroup
from raylarge.train.estimate.plan import PlanConfig
from raylarge.train.ingest import check_batch
from raylarge.train.monitor.trackers import TRACKERS
from raylarge.train.registry import TASKS
from raylarge.train.sequence import DEAL
from raylarge.train.task import Recipe, Run
from raylarge.train.tasks.cdm import CdmConfig
from raylarge.train.tasks.classifier import ClassifierConfig
from raylarge.train.tasks.controlnet import ControlnetConfig
from raylarge.train.tasks.ldm import LdmConfig
from raylarge.train.tasks.mil import MilConfig
from raylarge.train.tasks.prior import PriorConfig
from raylarge.train.tasks.vae import VaeConfig

MODELS = tuple(TASKS)

CHOICES = {
    "model": MODELS,
    "strategy": ("deepspeed", "torch"),
    "zero": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "schedule": ("constant", "cosine"),
    "result": ("last", "best"),
    "optimizer": ("adamw", "adamw8bit"),
    "track": tuple(TRACKERS),
}
BOUNDS = (
    ("micro_batch", 1, False),
    ("workers", 0, False),
    ("minutes", 0, True),
    ("lr", 0, True),
    ("clip", 0, False),
    ("warmup", 0, False),
    ("weight_decay", 0, False),
    ("spike", 0, False),
    ("validate", 0, False),
    ("sheet_every", 0, False),
    ("checkpoint_minutes", 0, False),
    ("max_failures", 0, False),
    ("resize_s", 0, False),
    ("sheet_gpus", 0, False),
)
"""What a value must be at least, or above."""
ONE_OR_MORE = ("steps", "batch", "checkpoint_every", "keep", "log_every", "patience", "super_block")


@dataclass(frozen=True)
class Train(Recipe):
    """Which model learns from what, and who does the work."""

    model: str = MISSING  # one of MODELS. Example: ldm
    data: str = MISSING  # folder of the tables. Example: data
    out: str = MISSING  # the bundle. Example: bundle
    min_workers: int = 0  # go on with as few as these while nodes are missing; 0: with all only
    resize_s: float = 60.0  # between two looks whether more workers can be had again
    gpu: bool | None = None  # one per worker; None: where the cluster has enough
    max_failures: int = 3  # of workers, before giving up; lost machines do not count
    logs: str | None = None  # folder for the workers' output; None: Ray's own. Example: /tmp/logs
    sheet_gpus: float = 0.0  # for the task that draws sheets under ZeRO-3
    track: str = "tensorboard"  # or wandb, mlflow, none
    plan: bool = False  # say what it would take, and start nothing
    card: PlanConfig = field(default_factory=PlanConfig)
    vae: VaeConfig = field(default_factory=VaeConfig)
    ldm: LdmConfig = field(default_factory=LdmConfig)
    cdm: CdmConfig = field(default_factory=CdmConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    controlnet: ControlnetConfig = field(default_factory=ControlnetConfig)
    mil: MilConfig = field(default_factory=MilConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    @property
    def worker_group(self) -> WorkerGroup:
        """How many workers train, and whether by DeepSpeed."""
        return WorkerGroup(self.workers, self.by_deepspeed)

    @property
    def run(self) -> Run:
        """The training with its paths."""
        own = getattr(self, self.model)
        names = {"mil": f"mil-{self.mil.fold}", "vae": self.vae.part}
        name = names.get(self.model, self.model)
        return Run(self, self.data, self.out, self.model, name, own)


def checked(config: Train) -> Train:
    """The config with absolute paths.

    Raises:
        UserError: a value that cannot be, no place for what is made, a network that cannot be
            built, or a batch that cannot be divided.
    """
    _check_recipe(config)
    _check_places(config)
    if config.model in ("ldm", "cdm"):
        getattr(config, config.model).check()
    if not 0 <= config.min_workers <= config.workers:
        raise UserError(
            f"min_workers={config.min_workers} must be from 0 to workers={config.workers}."
        )
    if config.optimizer == "adamw8bit" and config.by_deepspeed:
        raise UserError(
            "optimizer=adamw8bit has states of its own that DeepSpeed does not know; give "
            "strategy=torch."
        )
    check_batch(config, max(1, config.workers))
    whole: dict[str, Any] = {
        key: _absolute(getattr(config, key)) for key in ("data", "out", "logs")
    }
    files = {key: _absolute(getattr(config.classifier, key)) for key in ("synthetic", "weights")}
    whole["classifier"] = files
    whole["vae"] = {"lpips_backbone": _absolute(config.vae.lpips_backbone)}
    return configuration.build(Train, configuration.plain(config), whole)


def _check_recipe(config: Train) -> None:
    """Raises UserError: a number or a word of the training that cannot be."""
    configuration.require(*_finite(configuration.plain(config)))
    for key, choices in CHOICES.items():
        value = getattr(config, key)
        if value not in choices:
            known = ", ".join(str(choice) for choice in choices)
            raise UserError(f"{key}={value} is not known; choose one of: {known}.")
    for key in ONE_OR_MORE:
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)} must be 1 or more.")
    for key, least, above in BOUNDS:
        value = getattr(config, key)
        if value is not None and not (value > least if above else value >= least):
            raise UserError(f"{key}={value} must be {'above' if above else 'at least'} {least:g}.")
    betas, weights, seed = config.betas, config.scale_weights, config.seed
    summed = math.isfinite(DEAL * sum(map(abs, weights)))
    configuration.require(
        ("seed", seed, 0 <= seed < 1 << 63, "from 0 to 2^63 - 1"),
        ("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers from 0 to below 1"),
        ("scale_weights", weights, summed, "small enough to be added, such as shares of 1"),
    )


def _finite(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, bool, str]]:
    """A rule for every key: that its numbers are finite."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _finite(value, f"{prefix}{key}.")
        else:
            some = value if isinstance(value, list | tuple) else [value]
            fine = all(math.isfinite(one) for one in some if isinstance(one, float))
            yield f"{prefix}{key}", value, fine, "finite"


def _check_places(config: Train) -> None:
    """Raises UserError: no folder for the data or the bundle; a plan may do without.

    What is planned without data needs no bundle either; vae and ldm need none at all for it.
    """
    bare = config.plan and (not config.data or config.model in ("vae", "ldm"))
    for key, needed in (("data", not config.plan), ("out", not bare)):
        path = getattr(config, key)
        if needed or path:
            configuration.require_place(key, path)


def _absolute(path: str | None) -> str | None:
    return storage.absolute(path) if path else path
