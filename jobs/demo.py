"""The whole thread on one real slide: prepare, train, serve, two large images. `make demo`.

    slide -> data/ -> bundle/ (vae, ldm, cdm) -> patches.png -> Serve -> images/ -> report.json

Every stage is skipped when its inputs are those of an earlier run. The pictures come from the
networks trained here, unaided; the closing table says how good they are.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from jobs.demo_slides import drawn, fetch, separated
from jobs.demo_summary import captions, measures, summary
from jobs.presets import PREPARE, TRAIN
from raylarge import config as configuration
from raylarge import images, report, storage
from raylarge.compute.session import session
from raylarge.data.prepare import Prepare, prepare
from raylarge.errors import UserError
from raylarge.evaluate.conditioning import shuffled_loss
from raylarge.evaluate.references import ReferenceExample, references
from raylarge.geometry import guide_scale
from raylarge.models import bundle as bundles
from raylarge.order import Condition, parse
from raylarge.sampling import joint
from raylarge.sampling.plan import run
from raylarge.serve import app
from raylarge.train.ingest import latents_table
from raylarge.train.launch import Train, train
from raylarge.workers.worker import Worker

T = TypeVar("T")

SHARES = {"vae": 0.22, "ldm": 0.58, "cdm": 0.20}
"""How the minutes of training are divided."""

COLUMNS = 4
SAMPLER = {"steps": 20, "clamp": True, "derivative": "difference"}
IMAGES = {
    "reference": "conditioned on the slide's embeddings",
    "novel": "conditioned on tokens drawn by the CDM",
    "uncorrected": "as reference, without the correction",
}
ROWS = {
    "reference": "like the slide's region",
    "novel": "drawn by the CDM",
    "uncorrected": "like it, uncorrected",
}
"""What each row of images.png is, in few words."""


@dataclass(frozen=True)
class Demo:
    """What `make demo` understands.

    Attributes:
        slides: paths or patterns, separated by commas or spaces; left out: a small real slide.
            Example: a.svs,b.tif.
        out: where everything goes.
        minutes: of training, all three models together.
        size: side of the large images in pixels.
        seed: of training and of the images.
        workers: of Ray Data, Ray Train and Ray Serve.
    """

    slides: str = ""
    out: str = "out/demo"
    minutes: float = 3.5
    size: int = 512
    seed: int = 7
    workers: int = 2


class Thread:
    """The stages, in their order, over one output folder."""

    def __init__(self, config: Demo) -> None:
        self.config, self.out = config, Path(config.out).resolve()
        self.data, self.bundle = str(self.out / "data"), str(self.out / "bundle")
        self.logs = str(self.out / "logs")
        self.report = report.Report(str(self.out / "report.json"))
        self.key = json.dumps(vars(config), sort_keys=True)
        self.rows: list[list[Any]] = []
        self._stack, self._started = ExitStack(), False

    def stage(self, name: str, work: Callable[[], dict[str, Any]], *outputs: str) -> dict[str, Any]:
        """Do a stage, unless an earlier run did it from the same inputs; its facts.

        Each stage's key depends on the configuration and on all stages before it.
        """
        self.key = storage.digest(f"{self.key}/{name}".encode())
        facts = self.report.facts["stages"].get(name, {})
        skipped = facts.get("key") == self.key and all(map(storage.exists, outputs))
        if not skipped:
            report.say(f"{name} ...")
            with self.report.stage(name) as facts:
                below = [os.path.relpath(path, self.out) for path in outputs]
                facts.update(work(), key=self.key, outputs=below)
        time = "done before" if skipped else f"{self.report.facts['stages'][name]['seconds']:.0f} s"
        files = ", ".join(os.path.relpath(path) for path in outputs)
        self.rows.append([name, time, facts.get("rows", ""), files])
        return facts

    def run(self) -> None:
        """Run all stages, and print the closing tables, the total time and the peak memory."""
        with self._stack:
            checks = self._stages()
        stages = self.report.facts["stages"].values()
        total, peak = sum(facts["seconds"] for facts in stages), peak_bytes()
        measured = {"seconds_total": round(total, 1), "peak_memory_bytes": peak}
        self.report.add(seed=self.config.seed, versions=versions(), **measured)
        report.say("\n" + report.table(["stage", "time", "rows", "output"], self.rows))
        report.say("\n" + summary(checks))
        report.say(
            f"\nall stages together: {total:.0f} s; peak memory of this process {peak >> 20} MiB "
            f"(Ray's workers have their own)"
        )
        report.say(f"report: {os.path.relpath(self.report.path)}")

    def _stages(self) -> dict[str, Any]:
        slide = self.stage("slide", self._slide, str(self.out / "slides"))
        data, bundle = self.data, self.bundle
        self.stage("prepare", lambda: self._prepare(slide), f"{data}/shard.json")
        self.stage("train vae", lambda: self._train("vae"), f"{bundle}/vae")
        self.stage("encode", self._encode, f"{data}/examples")
        self.stage("train ldm", lambda: self._train("ldm"), f"{bundle}/unet")
        self.stage("train cdm", lambda: self._train("cdm"), f"{bundle}/cdm")
        self.stage("patches", self._patches, str(self.out / "patches.png"))
        pictures = [str(self.out / "images" / name / "image.png") for name in IMAGES]
        self.stage("serve", self._serve, *pictures)
        return self.stage("check", self._check, str(self.out / "images.png"))

    def _ray(self) -> None:
        """Start Ray before the first stage that needs it; it ends with the program."""
        if not self._started:
            self._started = True
            self._stack.enter_context(session(self.config.workers + 2, self.logs))

    def _slide(self) -> dict[str, Any]:
        folder = self.out / "slides"
        folder.mkdir(parents=True, exist_ok=True)
        if self.config.slides:
            return {"source": "given"}
        return fetch(folder) or drawn(folder, self.config.seed)

    def _prepare(self, slide: Mapping[str, Any]) -> dict[str, Any]:
        """Prepare the user's slides, or the one that the stage before put into its folder."""
        self._ray()
        slides = separated(self.config.slides) or str(self.out / "slides" / slide["slide"])
        layers = [PREPARE["tiny"], {"slides": slides, "out": self.data}]
        done = prepare(self._config(Prepare, *layers), self.report)
        return {"rows": done["shard"]["rows"], "counts": done["shard"]["counts"]}

    def _encode(self) -> dict[str, Any]:
        self._ray()
        layers = [PREPARE["tiny"], {"verbs": "encode", "bundle": self.bundle, "out": self.data}]
        return {"rows": prepare(self._config(Prepare, *layers), self.report)["encode"]["rows"]}

    def _train(self, model: str) -> dict[str, Any]:
        self._ray()
        places = {"model": model, "data": self.data, "out": self.bundle, "logs": self.logs}
        minutes = self.config.minutes * SHARES[model]
        run = {"minutes": minutes, "seed": self.config.seed}
        facts = train(self._config(Train, TRAIN[model]["tiny"], places, run))
        return {"rows": facts["samples"], "steps": facts["step"], "loss": facts["loss"]}

    def _config(self, schema: type[T], *layers: Mapping[str, Any]) -> T:
        return configuration.build(schema, *layers, {"workers": self.config.workers})

    def _patches(self) -> dict[str, Any]:
        """Held-out examples of every scale beside patches generated from their embeddings."""
        bundle, rows, labels = bundles.load(self.bundle), [], []
        worker = Worker(bundle)
        for k in range(bundle.patch.scales):
            chosen = references(self.data, k, COLUMNS)
            made = patches(worker, k, self.config.seed, chosen)
            rows.append(
                [
                    image
                    for pair in zip([r.image for r in chosen], made, strict=True)
                    for image in pair
                ]
            )
            labels.append(captions(k, bundle.base_mpp))
        path = str(self.out / "patches.png")
        sheet = images.sheet(rows, labels, ["held-out slide", "generated"] * COLUMNS)
        images.write_png(path, sheet, {"Title": "held-out references, generated patches"})
        return {"rows": COLUMNS * len(rows)}

    def _serve(self) -> dict[str, Any]:
        """Order the images over HTTP from a service of our own, and fetch them."""
        self._ray()
        url = app.start(self.bundle, port=0, workers=self.config.workers)
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                seconds = {name: self._ordered(client, name) for name in IMAGES}
        finally:
            app.stop()
        return {"rows": len(IMAGES), "seconds_each": seconds}

    def _ordered(self, client: httpx.Client, name: str) -> float:
        answer = client.post("/v1/images", json=self._order(name))
        if answer.status_code != 202:
            raise UserError(f"the service refused the order '{name}': {answer.text}")
        path = f"/v1/images/{answer.json()['id']}"
        with report.progress(None, name, total=100, unit="%") as bar:
            while (state := client.get(path).json())["state"] in ("queued", "running"):
                bar.update(int(100 * state["progress"]) - bar.n)
                time.sleep(0.2)
        if state["state"] != "done":
            raise UserError(f"the order '{name}' ended as {state['state']}: {state['error']}")
        for file in ("guide.png", "image.png"):
            content = client.get(f"{path}/{file}").raise_for_status().content
            storage.write_bytes(str(self.out / "images" / name / file), content)
        return float(state["seconds"])

    def _order(self, name: str) -> dict[str, Any]:
        inner = {"corrections": 0} if name == "uncorrected" else {}
        condition = (
            {"kind": "cdm"} if name == "novel" else Condition.of(self._region().grid).plain()
        )
        order = {"size": self.config.size, "seed": self.config.seed, "condition": condition}
        return {**order, "sampler": {**SAMPLER, **inner}}

    def _region(self) -> ReferenceExample:
        """The held-out region of the canvas' size with the most tissue."""
        side_px = PREPARE["tiny"]["tile"]["patch_px"]
        k = guide_scale((self.config.size, self.config.size), side_px).k
        return max(references(self.data, k, None), key=lambda found: found.tissue)

    def _check(self) -> dict[str, Any]:
        """Measure the images, lay them side by side, and test that the condition matters."""
        bundle, found, rows = bundles.load(self.bundle), {}, []
        for name in IMAGES:
            folder = self.out / "images" / name
            image, guide = (
                images.read_png(str(folder / f"{n}.png"))[0] for n in ("image", "guide")
            )
            found[name] = measures(image, guide, bundle.patch.side_px)
            rows.append(
                [
                    self._region().image if name != "novel" else np.full_like(guide, 255),
                    guide,
                    image,
                ]
            )
        side_px = bundle.patch.side_px
        k = guide_scale((self.config.size, self.config.size), side_px).k
        columns = [
            f"held-out region of the slide, {captions(k, bundle.base_mpp)}",
            f"guide: generated, {captions(k, bundle.base_mpp)}",
            f"large image: generated, {captions(0, bundle.base_mpp)}",
        ]
        sheet = images.sheet(rows, list(ROWS.values()), columns, 512)
        images.write_png(str(self.out / "images.png"), sheet, {"Title": "guides and large images"})
        latents = latents_table(self.data, self.bundle)
        losses = shuffled_loss(bundle, self.data, latents, seed=self.config.seed)
        return {"images": found, "loss": {str(k): dict(v) for k, v in losses.items()}}


def patches(worker: Worker, scale: int, seed: int, chosen: list[ReferenceExample]) -> np.ndarray:
    """One generated patch per reference, from its embeddings: uint8 [n, P, P, 3]."""
    condition = Condition.of(np.stack([found.grid for found in chosen])).plain()
    order = parse(
        {"count": len(chosen), "batch": len(chosen), "scale": scale, "seed": seed}
        | {"condition": condition, "sampler": {"steps": 50}}
    )
    return run(joint.plan(order, worker.bundle.patch), worker.answer)


def peak_bytes() -> int:
    """The most memory that this process and any one of its ended children held."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return 1024 * max(resource.getrusage(kind).ru_maxrss for kind in kinds)


def versions() -> dict[str, str]:
    """What the demo ran on."""
    names = ("raylarge", "torch", "diffusers", "deepspeed", "ray", "numpy")
    return {name: version(name) for name in names} | {"python": sys.version.split()[0]}


def main(arguments: list[str]) -> None:
    """Run the stages that are not done yet."""
    config = configuration.parse(Demo, arguments, {}, __doc__)
    storage.require_writable("out", config.out)
    Thread(config).run()


if __name__ == "__main__":
    report.entry(main)
