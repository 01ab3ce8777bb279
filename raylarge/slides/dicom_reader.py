"""Read DICOM whole slides: a folder of instances, or any one instance of a series.

OpenSlide is tried first: it needs no extra and reads JPEG, JPEG 2000 and uncompressed pixels fast.
wsidicom (extra `dicom`) reads what OpenSlide does not (JPEG-LS, HTJ2K, concatenations). Both read
the VOLUME images of one series alone, never labels, overviews or thumbnails, and of the tags only
pixel spacing and colour profile.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from raylarge.errors import MissingResource
from raylarge.slides import scenes
from raylarge.slides.openslide_reader import OpenSlidePyramid
from raylarge.slides.protocol import Hint, Pixels, Pyramid, UnreadableSlide, parser_errors

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""The class of VL Whole Slide Microscopy Image Storage."""
_EXTRA = "pip install 'raylarge[dicom]' brings what reads more kinds of DICOM."


def open_folder(path: str, scene: str = "") -> Pyramid:
    """Return the slide of the DICOM instances in a folder.

    Args:
        path: the folder.
        scene: which series, where there are several: its UID, or its number among the sorted UIDs.

    Raises:
        UnreadableSlide: the folder holds no slide, or several and none is named.
        MissingResource: wsidicom is missing.
    """
    if any(map(_is_dicom, _inside(Path(path)))):
        _wsidicom("the folder may hold DICOM")
    series = {}
    for file in reversed(_inside(Path(path))):
        if (uid := _volume_series(file)) is not None:
            series[uid] = str(file)
    names = sorted(series)
    if scene in names or (scene.isdigit() and int(scene) < len(names)):
        return open_instance(series[scene if scene in names else names[int(scene)]])
    if len(series) != 1 or scene:
        raise UnreadableSlide(
            f"the folder holds {len(series)} DICOM slides; name a slide's file, a folder "
            "with the instances of one, or tile.scene= (a number from 0, or the series UID)."
        )
    return open_instance(series[names[0]])


def open_instance(path: str, scene: str = "") -> Pyramid:
    """Return the slide of an instance; the others must be in the same folder.

    Raises:
        UnreadableSlide: neither OpenSlide nor wsidicom can open it, or a scene is named.
        MissingResource: OpenSlide cannot, and wsidicom is missing.
    """
    scenes.require_single_scene(scene)
    try:
        return OpenSlidePyramid(path)
    except UnreadableSlide as refusal:
        _wsidicom(str(refusal))
        return DicomPyramid(path)


class DicomPyramid:
    """The VOLUME levels of a series, by wsidicom."""

    georeference = None

    def __init__(self, path: str) -> None:
        """Open the series of an instance."""
        wsidicom, series = _wsidicom("the file is DICOM"), _volume_series(Path(path))
        beside = _inside(Path(path).parent)
        files = [file for file in beside if series and _volume_series(file) == series]
        with ExitStack() as opened:
            with parser_errors(Exception):  # wsidicom and pydicom raise anything on a garbled tag
                self._slide = opened.enter_context(wsidicom.WsiDicom.open(files))
                pyramid = self._slide.pyramid
                self._levels = [level.level for level in pyramid]
                self.sizes = [(level.size.height, level.size.width) for level in pyramid]
                self.mpp_hints = [Hint("pixel spacing", pyramid.mpp.height, pyramid.mpp.width)]
                paths = pyramid.metadata.optical_paths
                self.icc_profile: bytes | None = paths[0].icc_profile if paths else None
                self.notes = _unread(self._slide)
            opened.pop_all()

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """Return a region inside a level, in that level's pixels."""
        with parser_errors(Exception):
            region = self._slide.read_region((left, top), self._levels[level], (columns, rows))
            return np.asarray(region.convert("RGB"))

    def close(self) -> None:
        """Close the files."""
        self._slide.close()


def _unread(slide: Any) -> list[str]:
    """Return a note on the parts of a series that are not read."""
    shown = {
        "pyramids": len(slide.pyramids),
        "optical paths": len(slide.pyramid.base_level.optical_paths),
        "focal planes": len(slide.pyramid.base_level.focal_planes),
    }
    more = ", ".join(f"{count} {what}" for what, count in shown.items() if count > 1)
    return [f"the series holds {more}: wsidicom's default of them was read"] if more else []


def _wsidicom(because: str) -> Any:
    """Return the wsidicom package."""
    try:
        import wsidicom
    except ImportError as error:
        raise MissingResource(f"{because.rstrip('.')}; {_EXTRA}") from error
    return wsidicom


def _inside(folder: Path) -> list[Path]:
    with parser_errors():
        return sorted(folder.iterdir())


def _is_dicom(file: Path) -> bool:
    """Return whether a file has the signature of DICOM."""
    if not file.is_file():
        return False
    with parser_errors(), file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _volume_series(file: Path) -> str | None:
    """Return the series of a VOLUME instance of a whole slide; None for other files."""
    if not _is_dicom(file):
        return None
    import pydicom

    tags = ["SOPClassUID", "ImageType", "SeriesInstanceUID"]
    with parser_errors(Exception):
        try:
            facts = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        except pydicom.errors.InvalidDicomError:
            return None
        flavours = facts.get("ImageType") or []
        is_volume = "VOLUME" in flavours and facts.get("SOPClassUID") == _WHOLE_SLIDE
        return str(facts.get("SeriesInstanceUID")) if is_volume else None
