"""Slides in, tables out: tile, embed, shard, and what is derived from those examples.

python jobs/prepare.py slides='a.svs,folder/*.tif' out=DIR preset=tiny [workers=N] [on_error=skip]
python jobs/prepare.py out=DIR verbs=encode bundle=DIR [workers=N]
python jobs/prepare.py out=DIR verbs=caption,text_embed
python jobs/prepare.py out=DIR verbs=features bundle=DIR features.blocks=[3]
"""

from __future__ import annotations

from typing import Any

from jobs.presets import PREPARE
from raylarge import report, storage
from raylarge.config import parse, require_place
from raylarge.data.prepare import Prepare, prepare


def main(arguments: list[str]) -> None:
    """Run the verbs and print what each made."""
    config = parse(Prepare, arguments, PREPARE, __doc__)
    require_place("out", config.out)
    storage.require_writable("out", config.out)
    log = report.Report(storage.join(storage.absolute(config.out), "report.json"))
    done = prepare(config, log)
    header = ["verb", "seconds", "rows", "new", "failed", "tiles/s", "output"]
    rows = []
    for verb, facts in done.items():
        new = f"{facts['made']}/{facts['parts']}"
        some = [log.facts["stages"][verb]["seconds"], facts["rows"], new, facts["failed"]]
        rows.append([verb, *some, facts.get("tiles_per_s", ""), facts["output"]])
    report.say("\n" + report.table(header, rows))
    counted = [facts["counts"] for facts in done.values() if facts["counts"]]
    if counted:
        report.say("\n" + _counts(counted[-1]))
    report.say(f"\nreport: {log.path}")


def _counts(counts: dict[str, dict[str, Any]]) -> str:
    """Rows per scale and split."""
    splits = sorted({split for by in counts.values() for split in by})
    scales = sorted(counts, key=int)
    return report.table(
        ["examples", *splits],
        [[f"scale {k}", *(counts[k].get(split, 0) for split in splits)] for k in scales],
    )


if __name__ == "__main__":
    report.entry(main)
