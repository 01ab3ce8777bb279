"""An order in, an image out.

python jobs/sample.py bundle=DIR order.size=512 order.seed=7 out=DIR [order.recipe=released]
    [order.condition.kind=cdm] [reference=DATA[:slide_id] [at=row,column]] [workers=N]
    [order.refine=true] [order.levels=4,2,0] [order.algorithm=strided] [image=small.png]

Run again after an interruption, the same command goes on where it stopped. dry_run=true says
what the order costs, and does nothing.
"""

from __future__ import annotations

import os

from raylarge import report, storage
from raylarge.config import parse, require_place
from raylarge.execution.config import SampleConfig
from raylarge.execution.sample import sample


def main(arguments: list[str]) -> None:
    """Carry out the order and print its files and figures."""
    config = parse(SampleConfig, arguments, {}, __doc__)
    require_place("bundle", config.bundle)
    require_place("out", config.out)
    log = report.Report(storage.join(config.out, "report.json"))
    files = sample(config, log)
    if config.dry_run:
        return
    facts = log.facts
    done = facts["stages"]["sample"]
    made = f"{done['requests']} requests in {done['seconds']} s"
    again = f", {done['resumed']} more from an earlier run" if done["resumed"] else ""
    rows = [[name, os.path.relpath(path)] for name, path in files.items()]
    report.say(report.table(["file", "path"], [*rows, ["report.json", log.path]]))
    report.say(f"{made}{again}")
    for name, meaning in facts["meaning"].items():
        report.say(f"{name.replace('_', ' ')}: {facts[name]:.3f} ({meaning})")


if __name__ == "__main__":
    report.entry(main)
