import numpy as np
import pytest

from raylarge.slides.mpp import check_base_mpp, resolve_mpp
from raylarge.slides.openslide_reader import mpp_hints
from raylarge.slides.protocol import Hint, UnreadableSlide


class Source:
    """A pyramid of which only what it says matters."""

    sizes = ((1, 1),)
    icc_profile = None
    notes = ()

    def __init__(self, hints, ground):
        self.mpp_hints, self.georeference = hints, ground

    def read_level(self, level, top, left, rows, columns):
        return np.zeros((rows, columns, 3), np.uint8)

    def close(self):
        pass


def source(*hints, ground=None):
    return Source(hints, ground)


GROUND = {"crs": "EPSG:26911", "transform": [0.6, 0, 0, 0, -0.6, 0]}


def test_the_first_plausible_source_of_mpp_wins():
    properties = {
        "tiff.XResolution": "20000",
        "tiff.ResolutionUnit": "centimeter",
        "openslide.objective-power": "40",
        "aperio.MPP": "0.26",
        "openslide.mpp-x": "0.27",
    }
    expected = [0.27, 0.26, 0.5, 0.25]
    for name in ("openslide.mpp-x", "aperio.MPP", "tiff.XResolution", None):
        found = resolve_mpp(source(*mpp_hints(properties)), None)
        assert found == pytest.approx(expected.pop(0))
        properties.pop(name, None)
    assert expected == []
    assert resolve_mpp(source(*mpp_hints(properties)), 0.7) == 0.7
    odd = {"aperio.AppMag": "20", "openslide.mpp-x": "?"}
    assert mpp_hints(odd) == [Hint("aperio.AppMag", 0.5, 0.5)]


@pytest.mark.parametrize("dots", [72, 96, 300])
def test_a_screen_resolution_is_no_mpp(dots):
    found = mpp_hints({"tiff.XResolution": str(dots), "tiff.ResolutionUnit": "inch"})
    assert found[0].mpp_x == pytest.approx(25_400 / dots)
    with pytest.raises(UnreadableSlide, match=r"only says TIFF resolution .*set tile\.mpp="):
        resolve_mpp(source(*found), None)
    later = resolve_mpp(source(*found, Hint("objective power", 0.25, 0.25)), None)
    assert later == 0.25


def test_nothing_said_and_nonsense_are_refused():
    with pytest.raises(UnreadableSlide, match=r"does not say its resolution; set tile\.mpp="):
        resolve_mpp(source(), None)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UnreadableSlide, match=rf"tile\.mpp={wrong} is not above 0"):
            resolve_mpp(source(), wrong)


def test_pixels_that_are_no_squares_are_refused():
    properties = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}
    with pytest.raises(UnreadableSlide, match=r"pixels of 0\.5 x 0\.25 um .*not square"):
        resolve_mpp(source(*mpp_hints(properties)), None)
    assert resolve_mpp(source(*mpp_hints(properties)), 0.3) == 0.3
    near = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.252"}
    assert resolve_mpp(source(*mpp_hints(near)), None) == pytest.approx(0.251)


def test_what_is_plausible_depends_on_the_kind_of_source():
    metre = Hint("pixel size on the ground", 1e6, 1e6)
    assert resolve_mpp(source(metre, ground=GROUND), None) == 1e6
    with pytest.raises(UnreadableSlide, match="which no slide has"):
        resolve_mpp(source(metre), None)
    with pytest.raises(UnreadableSlide, match="which no slide has"):
        resolve_mpp(source(Hint("TIFF resolution", 0.5, 0.5), ground=GROUND), None)


def test_a_coarse_source_is_told_the_base_that_fits():
    with pytest.raises(
        UnreadableSlide, match=r"has 1 um/px, coarser .* of 0\.5; set tile\.base_mpp=1,"
    ):
        check_base_mpp(source(), 1.0, 0.5)
    with pytest.raises(
        UnreadableSlide, match=r"at 0\.6 m/px, .*0\.5 um/px; set tile\.base_mpp=1e6 \(1 m"
    ):
        check_base_mpp(source(ground=GROUND), 6e5, 0.5)
    with pytest.raises(UnreadableSlide, match=r"set tile\.base_mpp=1e7 \(10 m/px\)"):
        check_base_mpp(source(ground=GROUND), 1e7, 1e6)
    check_base_mpp(source(ground=GROUND), 1.05e6, 1e6)
