"""Convert a slide's pixels to sRGB by its embedded ICC profile.

The transform is built once per slide, with the profile's own rendering intent, as OpenSlide's
documentation recommends. A profile that changes no colour is not applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from raylarge.slides.protocol import Georeference, Hint, Pixels, Pyramid, UnreadableSlide

_ROUNDING = 1
"""Levels of 255 by which a transform from sRGB to sRGB misses."""


class SrgbPyramid:
    """A pyramid whose pixels are converted to sRGB."""

    def __init__(self, pyramid: Pyramid, transform: ImageCms.ImageCmsTransform) -> None:
        """See `to_srgb`."""
        self._pyramid, self._transform = pyramid, transform

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """As in the file."""
        return self._pyramid.sizes

    @property
    def mpp_hints(self) -> Sequence[Hint]:
        """As in the file."""
        return self._pyramid.mpp_hints

    @property
    def georeference(self) -> Georeference | None:
        """As in the file."""
        return self._pyramid.georeference

    @property
    def icc_profile(self) -> None:
        """None: these pixels are sRGB."""
        return None

    @property
    def notes(self) -> Sequence[str]:
        """As in the file."""
        return self._pyramid.notes

    def read_level(self, level: int, top: int, left: int, rows: int, columns: int) -> Pixels:
        """Return a region inside a level, in sRGB."""
        return _applied(self._transform, self._pyramid.read_level(level, top, left, rows, columns))

    def close(self) -> None:
        """Close the file."""
        self._pyramid.close()


def to_srgb(pyramid: Pyramid) -> Pyramid:
    """Return a pyramid in sRGB: itself if it has no profile, or one that changes nothing.

    Raises:
        UnreadableSlide: the profile is broken, or not one of RGB.
    """
    profile = pyramid.icc_profile
    if profile is None:
        return pyramid
    transform = _transform(profile)
    probe = np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3), axis=-1).reshape(18, -1, 3)
    change = _applied(transform, probe.astype(np.uint8)).astype(int) - probe
    return pyramid if np.abs(change).max() <= _ROUNDING else SrgbPyramid(pyramid, transform)


def broken(error: Exception) -> UnreadableSlide:
    """Return the error for a profile that cannot be used."""
    reason = " ".join(str(error).split())
    return UnreadableSlide(
        f"the file has an ICC profile that cannot be used ({reason}); set tile.icc=false to take "
        "its pixels as they are."
    )


def _transform(profile: bytes) -> ImageCms.ImageCmsTransform:
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space != "RGB":
            raise ValueError(f"it is one of {space}, the pixels are RGB")
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            "RGB",
            "RGB",
            renderingIntent=ImageCms.Intent(ImageCms.getDefaultIntent(source)),
        )
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError) as error:
        raise broken(error) from error


def _applied(transform: ImageCms.ImageCmsTransform, pixels: Pixels) -> Pixels:
    image = Image.fromarray(pixels)
    ImageCms.applyTransform(image, transform, inPlace=True)
    return np.asarray(image)
