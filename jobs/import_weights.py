"""A published ZoomLDM or Graikos et al. checkpoint in, a bundle out.

python jobs/import_weights.py checkpoint=weights.ckpt [cdm=cdm.pt] out=DIR [encoder=uni]
"""

from __future__ import annotations

from raylarge import report, storage
from raylarge.config import parse
from raylarge.models.bundle_import import ImportConfig, import_bundle


def main(arguments: list[str]) -> None:
    """Import and print what was found."""
    config = parse(ImportConfig, arguments, {}, __doc__)
    if config.out.strip():
        storage.require_writable("out", config.out)
    counts = import_bundle(config)
    rows = [[name, f"{count:,}"] for name, count in counts.items()]
    report.say(report.table(["part", "parameters"], rows))
    report.say(f"bundle: {config.out}")


if __name__ == "__main__":
    report.entry(main)
