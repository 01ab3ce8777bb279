"""Partition of unity and round trip on the canvas, and the published blending figures."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylarge.geometry import Patch, windows
from raylarge.sampling import canvas

SIDES = st.sampled_from([8, 16, 32])


@settings(max_examples=40, deadline=None)
@given(side=SIDES, rows=st.integers(1, 60), columns=st.integers(1, 60), part=st.integers(1, 8))
def test_blending_weights_sum_to_one(side, rows, columns, part):
    """Partition of unity: on every pixel, any size, any stride."""
    size = (side + rows, side + columns)
    weights = canvas.blend_weights(size, side, max(1, side * part // 8))
    assert torch.allclose(weights.sum(dim=0), torch.ones(size), atol=1e-5)
    assert (weights >= 0).all()


@settings(max_examples=40, deadline=None)
@given(side=SIDES, rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_scatter_of_gather_is_the_identity(side, rows, columns):
    """Round trip."""
    size = (rows * side, columns * side)
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(rows))
    places = windows(size, side, side)
    assert torch.equal(canvas.scatter(canvas.gather(image, places, side), places, size), image)


class Stretch:
    """The parity figures' decoder: tanh(nearest x4 + 0.1 linspace(-1, 1, P) along x)."""

    def encode(self, image):
        raise NotImplementedError

    def decode(self, latent):
        big = torch.nn.functional.interpolate(latent, scale_factor=4, mode="nearest")
        return torch.tanh(big + 0.1 * torch.linspace(-1, 1, big.shape[-1]))


def test_the_kernel_is_the_published_one(parity):
    figures = np.load(parity / "kernel.npz")
    for name in figures.files:
        side = figures[name].shape[-1]
        sigma = 0.8 if side == 256 else 1.0
        ours = canvas.kernel(side, sigma).numpy()
        assert np.abs(ours - figures[name].squeeze()).max() <= 1e-6, json.dumps(name)


@pytest.mark.parametrize("band_px", [384, 128, 96])
def test_blended_decode_equals_the_published_one_however_it_is_banded(parity, band_px):
    figures = np.load(parity / "decode_large.npz")
    latent = torch.from_numpy(figures["z"])[0]
    patch = Patch(side_px=256, factor=4, channels=3, scales=1)
    bands = [
        canvas.decode_band(
            Stretch(), latent, canvas.PixelBand(top, min(top + band_px, 384), 384), patch, 4
        )
        for top in range(0, 384, band_px)
    ]
    image = torch.cat(bands, dim=1)
    published = figures[next(name for name in figures.files if name != "z")].squeeze()
    truncated = ((image.clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy().astype(np.uint8)
    assert truncated.shape == published.shape
    off = np.abs(truncated.astype(int) - published.astype(int))
    assert off.max() <= 1
    assert (off == 0).mean() > 0.999


def test_bands_agree_to_the_bit():
    latent = torch.randn(3, 96, 64, generator=torch.Generator().manual_seed(0))
    patch = Patch(side_px=64, factor=4, channels=3, scales=1)
    whole = canvas.decode_band(Stretch(), latent, canvas.PixelBand(0, 384, 384), patch, 4)
    first = canvas.touching(384, 64, 16, 128, 256)[0] // 4
    band = canvas.PixelBand(128, 256, 384, first)
    part = canvas.decode_band(Stretch(), latent[:, first:], band, patch, 4)
    assert first > 0
    assert torch.equal(whole[:, 128:256], part)
