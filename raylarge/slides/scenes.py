"""Which image of a file with several is read: OME series, DICOM series, regions of a scan.

`tile.scene=` names one by its name or by its number from 0. Without it the largest is read, the
first among equals, and a note says so. Notes and refusals give numbers and sizes, never the names:
these often hold the file's.
"""

from __future__ import annotations

from collections.abc import Sequence

from raylarge.slides.protocol import UnreadableSlide

_MOST_LISTED = 8


def choose(
    names: Sequence[str], sizes: Sequence[tuple[int, int]], scene: str
) -> tuple[int, list[str]]:
    """Return the number of the scene to read, and a note where there was a choice.

    Args:
        names: of the scenes, where they have any; not unique.
        sizes: (rows, columns) of each.
        scene: `tile.scene`.

    Raises:
        UnreadableSlide: there is no scene, none of this name or number, or several of this name.
    """
    count = len(sizes)
    if not count:
        raise UnreadableSlide("the file holds no image; fetch it again or leave it out.")
    listed = _listed(sizes)
    if scene:
        named = [i for i, name in enumerate(names) if name == scene]
        if len(named) > 1:
            raise UnreadableSlide(
                f"the file holds {len(named)} scenes of the name tile.scene={scene}; give the "
                f"number of one: {listed}."
            )
        if not named and not (scene.isascii() and scene.isdigit() and int(scene) < count):
            raise UnreadableSlide(
                f"the file holds no scene tile.scene={scene}, but {count}: {listed}; give one's "
                "number or name."
            )
        number = named[0] if named else int(scene)
        return number, [f"scene {number} of {count} was read"] if count > 1 else []
    areas = [rows * columns for rows, columns in sizes]
    number = areas.index(max(areas))
    if count == 1:
        return 0, []
    why = "the first of the largest" if areas.count(areas[number]) > 1 else "the largest"
    return number, [
        f"the file holds {count} scenes ({listed}): scene {number}, {why}, was read "
        "(tile.scene= names another)"
    ]


def require_single_scene(scene: str) -> None:
    """Refuse a `tile.scene` that is not the only image of a file.

    Raises:
        UnreadableSlide: it is neither empty nor 0.
    """
    if scene not in ("", "0"):
        raise UnreadableSlide(
            f"the file holds a single image, and tile.scene={scene} names another; leave it out "
            "or run it by itself without tile.scene=."
        )


def _listed(sizes: Sequence[tuple[int, int]]) -> str:
    shown = [f"{i} of {rows} x {columns} px" for i, (rows, columns) in enumerate(sizes)]
    more = len(shown) - _MOST_LISTED
    return ", ".join(shown[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
