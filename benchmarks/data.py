"""Benchmark of the data engine: reading against CLAM, Ray's overhead, scaling, memory, cost.

python -m benchmarks.data [quick=true] [only=read,overhead,scaling,memory,plan] [out=PAGE.md]

All methods read the same cells of the same slides and embed them with the same network. A full run
writes results/data_<cores>cores_<yyyymm>.md and a .json beside it with every sample; quick runs
write only to out=. Sections: `data_speed.py`, `data_memory.py`, `data_plan.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import data_memory, data_plan, data_speed, page
from benchmarks.data_speed import DataMeasure
from benchmarks.page import Section
from raylarge import report, storage
from raylarge.config import parse
from raylarge.errors import UserError


@dataclass(frozen=True)
class DataBench:
    """Sections and sizes of the benchmark.

    Attributes:
        only: some of read, overhead, scaling, memory and plan.
        pairs: timings of each way; this and the next six are those of `DataMeasure`.
        units: width of the slides in units of 3,840 px; their height is a quarter.
        rows: of base tiles to read of a slide.
        block: base tiles per part, about.
        minutes: duration of the comparison of Ray with this process.
        workers: of Ray and of the DataLoader in `read`.
        cost_ms: milliseconds per tile of the encoder that sleeps.
        copies: slides of the larger run of `memory`.
        out: the page to write.
    """

    quick: bool = False
    only: str = "read,overhead,scaling,memory,plan"
    pairs: int = 3
    units: int = 12
    rows: int = 15
    block: int = 540
    minutes: float = 2.0
    workers: int = 2
    cost_ms: float = 20.0
    copies: int = 20
    out: str = ""


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "pairs": 1,
        "units": 1,
        "rows": 6,
        "block": 45,
        "minutes": 0.1,
        "cost_ms": 5.0,
        "copies": 2,
    }
}


def main(words: list[str]) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    quick = "quick=true" in words
    config = parse(DataBench, ["preset=quick", *words] if quick else words, PRESETS)
    names = config.only.split(",")
    if unknown := set(names) - PARTS.keys():
        raise UserError(f"only={','.join(sorted(unknown))} is not of {', '.join(PARTS)}.")
    sections = []
    with tempfile.TemporaryDirectory(prefix="raylarge-data-") as folder:
        keys = {"pairs", "units", "rows", "block", "minutes", "workers", "cost_ms"}
        chosen = {name: value for name, value in asdict(config).items() if name in keys}
        measure = DataMeasure(Path(folder), **chosen)
        for name in names:
            sections.append(PARTS[name](measure, config))
            page.show(sections[-1])
    cores = f"{os.cpu_count()}cores"
    if out := config.out or ("" if quick else page.place("data", cores)):
        _write(out, sections, measure)


def _write(out: str, sections: list[Section], measure: DataMeasure) -> None:
    """Write the page, and beside it tables and samples as JSON."""
    readers = ", ".join(f"{name} {version(name)}" for name in ("openslide-python", "ray"))
    sections[0].notes.insert(0, f"{readers}. {measure.about}")
    command = page.command("benchmarks.data")
    page.write(out, f"Slides to examples on {os.cpu_count()} cores", command, sections)
    tables = [asdict(section) for section in sections]
    document = {"command": command, "tables": tables, "samples": measure.samples}
    storage.write_json(storage.absolute(str(Path(out).with_suffix(".json"))), document)


PARTS: dict[str, Callable[[DataMeasure, DataBench], Section]] = {
    "read": lambda measure, _: data_speed.read(measure),
    "overhead": lambda measure, _: data_speed.overhead(measure),
    "scaling": lambda measure, _: data_speed.scaling(measure),
    "memory": lambda measure, config: data_memory.section(measure, config.copies),
    "plan": lambda measure, _: data_plan.section(measure),
}

if __name__ == "__main__":
    report.entry(main)
