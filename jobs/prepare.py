"""Slides in, tables out: tile, embed, shard (and encode, once there is an autoencoder).

python jobs/prepare.py slides='a.svs,folder/*.tif' out=DIR preset=tiny [workers=N]
python jobs/prepare.py out=DIR verbs=encode bundle=DIR [workers=N]
"""

from __future__ import annotations

from jobs.presets import PREPARE
from raylarge import report, storage
from raylarge.config import parse
from raylarge.data.prepare import Prepare, prepare


def main(arguments: list[str]) -> None:
    """Run the verbs and print what each made."""
    config = parse(Prepare, arguments, PREPARE)
    log = report.Report(storage.join(storage.absolute(config.out), "report.json"))
    done = prepare(config, log)
    seconds = {verb: log.facts["stages"][verb]["seconds"] for verb in done}
    rows = [[verb, seconds[verb], facts["rows"], facts["output"]] for verb, facts in done.items()]
    report.say(report.table(["verb", "seconds", "rows", "output"], rows))
    report.say(f"report: {log.path}")


if __name__ == "__main__":
    report.entry(main)
