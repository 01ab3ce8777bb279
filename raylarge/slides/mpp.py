"""The resolution of a slide, from what it says or what the user says; never a silent default.

An override comes first, then the file's hints in their order: properties and vendors' fields,
TIFF resolution, objective power (10 um/px over it). The chain follows Mussel
(github.com/pathology-data-mining/Mussel). A hint counts where it is plausible for its kind of
source: 72 dpi, which programs write without knowing, is no microscope's 352 um/px.
"""

from __future__ import annotations

from raylarge.slides.protocol import Pyramid, UnreadableSlide

BASE_MPP = 0.5
"""The base scale of microscopy: 20x."""
AERIAL_BASE_MPP = 1e6
"""The base scale of aerial images: 1 m/px."""
TOLERANCE = 0.1
"""Resolutions this near the base count as the base."""
_MICROSCOPE_MPP = (0.05, 20.0)
_AERIAL_MPP = (1e4, 1e8)
_SQUARE = 0.05


def resolve_mpp(pyramid: Pyramid, override: float | None) -> float:
    """Return micrometres per level-0 pixel: the override, or the file's first plausible hint.

    Raises:
        UnreadableSlide: an override that is not positive, nothing plausible, or pixels that are not
            square.
    """
    if override is not None:
        if not 0 < override < float("inf"):
            raise UnreadableSlide(f"tile.mpp={override} is not above 0; set micrometres per pixel.")
        return override
    hints = pyramid.mpp_hints
    low, high = _MICROSCOPE_MPP if pyramid.georeference is None else _AERIAL_MPP
    for source, mpp_y, mpp_x in hints:
        if low <= mpp_y <= high and low <= mpp_x <= high:
            if abs(mpp_y / mpp_x - 1) > _SQUARE:
                raise UnreadableSlide(
                    f"the file has pixels of {mpp_y:.4g} x {mpp_x:.4g} um ({source}), not square "
                    "ones; resample it, or set tile.mpp= (micrometres per pixel) if that is wrong."
                )
            return (mpp_y + mpp_x) / 2
    seen = ", ".join(f"{source} {mpp_x:.4g}" for source, _, mpp_x in hints)
    claim = (
        f"only says {seen} um/px, which no slide has" if hints else "does not say its resolution"
    )
    raise UnreadableSlide(f"the file {claim}; set tile.mpp= (micrometres per level-0 pixel).")


def check_base_mpp(pyramid: Pyramid, mpp: float, base_mpp: float) -> None:
    """Refuse a slide that is coarser than the base scale, or lost in one of its pixels.

    Raises:
        UnreadableSlide: with the base scale that would fit.
    """
    if mpp <= base_mpp * (1 + TOLERANCE):
        if min(pyramid.sizes[0]) * mpp * (1 + TOLERANCE) < base_mpp:
            raise UnreadableSlide(
                f"the slide is less than one pixel of the base scale of {base_mpp:.3g} um/px; set "
                "a smaller tile.base_mpp=, or leave it out."
            )
        return
    if pyramid.georeference is None:
        raise UnreadableSlide(
            f"the slide has {mpp:.3g} um/px, coarser than the base scale of {base_mpp:.3g}; set "
            f"tile.base_mpp={mpp:.3g}, a right tile.mpp=, or leave the slide out."
        )
    fits = AERIAL_BASE_MPP if mpp <= AERIAL_BASE_MPP * (1 + TOLERANCE) else float(f"{mpp:.3g}")
    raise UnreadableSlide(
        f"the image shows the ground at {mpp / 1e6:.3g} m/px, coarser than the base scale of "
        f"{base_mpp:.3g} um/px; set tile.base_mpp={fits:g} ({fits / 1e6:g} m/px).".replace(
            "e+0", "e"
        )
    )


def zoom(mpp: float, base_mpp: float) -> float:
    """Return level-0 pixels per base pixel; within the tolerance no resampling is done."""
    return 1.0 if abs(mpp / base_mpp - 1) <= TOLERANCE else base_mpp / mpp
