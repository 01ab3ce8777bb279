"""Which slides cannot be opened: all of them at once, where a run stops at the first.

Only what a slide says of itself is read (format, levels, pixel size); a slide that is damaged
further in shows later, when its pixels are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from raylarge import report
from raylarge.data import parts, pipeline, slide_index
from raylarge.data.grid import about
from raylarge.data.pipeline import ExecutorConfig, Facts
from raylarge.data.tile_candidates import TileConfig
from raylarge.data.units import TileUnit
from raylarge.errors import SlideError
from raylarge.slides.reader import open_slide


class Opening:
    """The work of a unit: open its slide and close it again."""

    def __init__(self, config: TileConfig) -> None:
        """Hold the config."""
        self._config = config

    def __call__(self, unit: TileUnit) -> Facts:
        """No facts; SlideError where the slide cannot be opened."""
        config = self._config
        with about(unit):
            open_slide(
                unit.path, unit.mpp, config.base_mpp, config.icc, config.read_options
            ).close()
        return {}


def refuse_all(
    root: str,
    units: Sequence[TileUnit],
    config: TileConfig,
    executor: ExecutorConfig,
    names: Mapping[str, str],
) -> SlideError | None:
    """List the slides that cannot be opened in the terminal, if they are several.

    Args:
        root: the data folder; slides whose part is there already are left out.
        units: of the slides.
        config: how slides are opened.
        executor: who opens them.
        names: file names by pseudonym, where the list shall have them.

    Returns:
        What to raise; None if at most one slide cannot be opened.
    """
    rest = [one for one in units if parts.standing(root, one.part).get("stamp") != one.stamp]
    answers = pipeline.run(rest, partial(Opening, config), replace(executor, skip=True), "check")
    reasons = [str(one["failed"]) for one in answers if "failed" in one]
    if len(reasons) < 2:
        return None
    for reason in reasons:
        report.say(f"  {slide_index.with_names(reason, names)}")
    return SlideError(
        f"{len(reasons):,} of {len(units):,} slides cannot be read (they are listed above); mend "
        "them, or leave them out with on_error=skip."
    )
