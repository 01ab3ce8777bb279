"""The one downsampling operator: the published resizer, and what U is to A."""

import numpy as np
import pytest
import torch

from raylarge.resample import bicubic_matrix, downsample, upsample


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_the_matrix_is_the_published_resizer(parity, factor):
    published = np.load(parity / "resizer.npz")[f"D{factor}"]
    assert np.abs(bicubic_matrix(256, factor) - published).max() <= 1e-6


@pytest.mark.parametrize(("side", "factor"), [(64, 8), (32, 4), (48, 2), (8, 8)])
def test_rows_sum_to_one_and_flat_images_stay_flat(side, factor):
    assert np.allclose(bicubic_matrix(side, factor).sum(axis=1), 1)
    flat = torch.full((3, side, 2 * side), 0.3)
    assert torch.allclose(downsample(flat, factor), torch.tensor(0.3), atol=1e-6)
    assert torch.allclose(upsample(downsample(flat, factor), factor), flat, atol=1e-5)


def test_upsampling_is_the_scaled_transpose():
    """<U y, x> = s^2 <y, A x>."""
    x, y = torch.randn(2, 3, 32, 48).double(), torch.randn(2, 3, 8, 12).double()
    assert torch.allclose((upsample(y, 4) * x).sum(), 16 * (y * downsample(x, 4)).sum())


def test_a_side_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="30 px cannot be divided by 4"):
        bicubic_matrix(30, 4)
