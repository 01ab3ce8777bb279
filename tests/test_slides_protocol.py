import errno
import os

import numpy as np
import pytest

from raylarge import pyramid
from raylarge.errors import MissingResource, SlideError, UserError
from raylarge.slides.protocol import DAMAGE, UnreadableSlide, parser_errors, user_errors
from raylarge.slides.reader import open_slide
from raylarge.slides.tiff_reader import TiffLevel


def told(error, *kinds):
    """What becomes of an exception of a parser that reads the slide `a.svs`."""
    try:
        with user_errors("a.svs"), parser_errors(*kinds):
            raise error
    except Exception as found:
        return type(found), str(found)


@pytest.mark.parametrize("kind", [*DAMAGE, OSError])
def test_what_a_parser_raises_is_damage(kind):
    reason = r"the file is damaged or incomplete (cut short); fetch it again or leave it out."
    assert told(kind("cut\n short. ")) == (SlideError, f"slide a.svs: {reason}")


@pytest.mark.parametrize(
    ("number", "kind", "sentence"),
    [
        (errno.ENOENT, SlideError, "slide a.svs: the file does not exist; check the path."),
        (errno.ENOTDIR, SlideError, "slide a.svs: the file does not exist; check the path."),
        (errno.EACCES, SlideError, "slide a.svs: the file may not be read; check its permissions."),
        (
            errno.EINVAL,
            SlideError,
            "slide a.svs: the file is damaged or incomplete ",
        ),  # a garbled offset
        (
            errno.EIO,
            UserError,
            "slide a.svs: the file cannot be read now (Input/output error); check ",
        ),
        (
            errno.ESTALE,
            UserError,
            "slide a.svs: the file cannot be read now (Stale file handle); check ",
        ),
        (
            errno.EMFILE,
            UserError,
            "slide a.svs: the file cannot be read now (Too many open files); check ",
        ),
    ],
)
def test_a_disk_that_fails_is_no_fault_of_the_slide(number, kind, sentence):
    found, text = told(OSError(number, os.strerror(number)))
    assert (found, text[: len(sentence)]) == (kind, sentence)


def test_memory_and_packages_that_are_missing_are_no_faults_of_the_slide():
    assert told(MemoryError("no room"), Exception) == (MemoryError, "no room")
    found, text = told(ImportError("no codec"))
    assert (found, text) == (
        UserError,
        "slide a.svs: the file needs a package that is missing here (no codec); install it.",
    )
    assert told(MissingResource("No room.")) == (UserError, "slide a.svs: No room.")
    assert told(UnreadableSlide("It is empty.")) == (SlideError, "slide a.svs: It is empty.")
    assert told(UserError("the store is away."), Exception) == (UserError, "the store is away.")


def test_kinds_replace_what_counts_as_damage():
    assert told(ValueError("a bug"), KeyError) == (ValueError, "a bug")
    assert told(KeyError("a"), KeyError)[0] is SlideError


def test_bugs_of_ours_show(tmp_path, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    pyramid.write_image(str(tmp_path / "a.tif"), image, 0.5)

    def wrong(self, *_):
        raise IndexError("a bug")

    with open_slide(str(tmp_path / "a.tif")) as slide:
        monkeypatch.setattr(TiffLevel, "read", wrong)
        with pytest.raises(IndexError, match="a bug"):
            slide.read(0, 0, 8, 8)
    monkeypatch.setattr(TiffLevel, "__init__", wrong)
    with pytest.raises(IndexError, match="a bug"):
        open_slide(str(tmp_path / "a.tif"))
