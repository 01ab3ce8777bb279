"""The interface of a slide reader: levels of 8-bit RGB pixels, facts about them, and its errors.

A reader raises `UnreadableSlide` if the file is at fault and `MissingResource` if this machine
lacks something; `user_errors` adds the file's path for the user. Only calls of a parser or
decoder stand in `parser_errors()`, so that errors of our own code stay visible. Readers never
read labels, macro images or patients' tags, and know nothing of scales and caches.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from raylarge.errors import MissingResource, SlideError, UserError
from raylarge.storage import redacted

Pixels = UInt8[np.ndarray, "_ _ 3"]

WHOLE_PX = 1 << 26
"""67 Mpx (200 MB): larger images that have no tiles are converted before they are read."""
DECODE_PX = 1 << 29
"""537 Mpx: more is never decoded at once, against decompression bombs (4 bytes each at most)."""
SLIDE_PX = 1 << 38
"""275 Gpx, six times the largest scans: what a header may claim at all."""

DAMAGE: tuple[type[Exception], ...] = (
    ArithmeticError,
    EOFError,
    LookupError,
    RuntimeError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow, tifffile and imagecodecs raise on files that are cut short or garbled."""
_OF_THE_PATH = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_OF_THE_CONTENT = (None, errno.EINVAL, errno.EOVERFLOW)
"""An OSError of a parser itself has no number; these come of offsets that make no sense."""


class UnreadableSlide(Exception):
    """A sentence on what is wrong with a file, and the cure; `user_errors` adds the path."""


class Hint(NamedTuple):
    """A resolution that a file states, in micrometres per level-0 pixel."""

    source: str
    mpp_y: float
    mpp_x: float


class ReadOptions(NamedTuple):
    """Options of the user for reading files; an empty one leaves the choice to the reader."""

    scene: str = ""
    """Which image of a file with several: its name, or its number from 0."""
    bands: tuple[int, ...] = ()
    """Numbers from 1 of red, green and blue, or of grey alone."""
    value_range: tuple[float, ...] = ()
    """The values that become 0 and 255, in samples of more than 8 bits."""


AS_STORED = ReadOptions()


class Georeference(TypedDict):
    """Where level 0 lies on the ground."""

    crs: str
    """`EPSG:code`, or WKT where there is none."""
    transform: list[float]
    """a, b, c, d, e, f: x = a column + b row + c, y = d column + e row + f."""


@runtime_checkable
class Pyramid(Protocol):
    """A reader of one file format: levels of pixels, finest first."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(rows, columns) of each level."""
        ...

    @property
    def mpp_hints(self) -> Sequence[Hint]:
        """Resolutions that the file states, most trusted first."""
        ...

    @property
    def icc_profile(self) -> bytes | None:
        """Return the embedded colour profile of the pixels."""
        ...

    @property
    def georeference(self) -> Georeference | None:
        """Return where the image lies on the ground; None for microscopy."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Choices of the reader that a user may want to change; they contain no file names."""
        ...

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """Return a region that lies inside a level, in that level's pixels."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


@contextmanager
def user_errors(path: str, kind: str = "slide") -> Iterator[None]:
    """Turn what readers raise into one sentence about a file.

    Raises:
        SlideError: in the place of a `UnreadableSlide`.
        UserError: in the place of a `MissingResource`.
    """
    try:
        yield
    except UnreadableSlide as error:
        raise SlideError(f"{kind} {redacted(path)}: {error}") from error
    except MissingResource as error:
        raise UserError(f"{kind} {redacted(path)}: {error}") from error


@contextmanager
def parser_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of a parser or decoder into `UnreadableSlide`; enclose only such calls.

    Args:
        kinds: the errors that it raises on damaged bytes, besides OSError; by default `DAMAGE`.

    Raises:
        UnreadableSlide: the file is missing, may not be read, or its bytes are not right.
        MissingResource: its disk fails, or a package is missing.
    """
    kinds = kinds or DAMAGE
    try:
        yield
    except (UnreadableSlide, MissingResource, UserError, MemoryError):
        raise
    except ImportError as error:
        raise MissingResource(
            f"the file needs a package that is missing here ({error}); install it."
        ) from error
    except OSError as error:
        raise _of_disk(error) from error
    except kinds as error:
        raise _damaged(error) from error


def _of_disk(error: OSError) -> UnreadableSlide | MissingResource:
    if error.errno in _OF_THE_PATH:
        return UnreadableSlide("the file does not exist; check the path.")
    if isinstance(error, PermissionError):
        return UnreadableSlide("the file may not be read; check its permissions.")
    if error.errno in _OF_THE_CONTENT:
        return _damaged(error)
    return MissingResource(
        f"the file cannot be read now ({error.strerror}); check the disk or share that holds it."
    )


def _damaged(error: Exception) -> UnreadableSlide:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return UnreadableSlide(
        f"the file is damaged or incomplete ({reason}); fetch it again or leave it out."
    )


def check_size(size: tuple[int, int], limit_px: int) -> None:
    """Refuse more pixels than a limit.

    Raises:
        UnreadableSlide: with the limit and the cure.
    """
    rows, columns = size
    if rows * columns > limit_px:
        raise UnreadableSlide(
            f"the file claims {rows} x {columns} pixels, and more than {limit_px:,} are not "
            "decoded at once; if it is no decompression bomb, convert it to a tiled TIFF (for "
            "example with `vips tiffsave --tile --pyramid --bigtiff`)."
        )
    if rows < 1 or columns < 1:
        raise UnreadableSlide(
            f"the file has {rows} x {columns} pixels: nothing to read; leave it out."
        )


def version_of(path: str) -> str:
    """Return a string that identifies the current version of a local file."""
    facts = os.stat(path)
    return f"{os.path.abspath(path)} {facts.st_size} {facts.st_mtime_ns}"
