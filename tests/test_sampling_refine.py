"""Seam removal and interpolation against the published figures (law 8), and what must hold."""

import pytest
import torch
from published import drawn, figures

from raylarge.diffusion.schedule import Schedule
from raylarge.diffusion.slerp import slerp
from raylarge.geometry import windows
from raylarge.models.cells import normalise
from raylarge.models.denoiser import NetworkDenoiser, guided, standard_guidance
from raylarge.sampling.canvas import scatter
from raylarge.sampling.refine import Refine, remove_seams
from raylarge.sampling.strided import averaged, interpolated

CORNERS = [(0, 0), (0, 64), (64, 0), (64, 64)]


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_the_published_one(parity, u):
    wanted = figures(parity, "slerp")
    assert (slerp(u, wanted["a"], wanted["b"]) - wanted[f"t{u}"]).abs().max() <= 1e-6


def test_slerp_of_parallel_and_zero_vectors(parity):
    wanted = figures(parity, "slerp")
    a, b = wanted["a"], wanted["b"]
    assert (slerp(0.3, a, 1.001 * a + 1e-4) - wanted["near"]).abs().max() <= 1e-6
    assert torch.allclose(slerp(0.3, torch.zeros_like(b), b), 0.3 * b)
    assert torch.allclose(slerp(0.5, a, -a), torch.zeros_like(a), atol=1e-6)
    both = slerp(torch.tensor([0.0, 1.0]), torch.stack([a, a]), torch.stack([b, b]))
    assert torch.allclose(both, torch.stack([a, b]), atol=1e-6)


def published_unet(x_t, t, context):
    """The figures' analytic model; t is the timestep that the released loop tells it."""
    return 0.3 * x_t.tanh() + 0.01 * context.mean(dim=(1, 2))[:, None, None, None] + 1e-4 * t


def test_seam_removal_is_the_published_one(parity):
    given = figures(parity, "postprocess")
    size, places = (128, 128), windows((128, 128), 64, 16)
    embeddings = interpolated(given["ssl"], places, 64)
    contexts = normalise(embeddings)[:, :8].sum(dim=1)[:, None, None].expand(-1, 65, 512)

    def noise(k):  # the released code draws the first noise patch by patch, the others whole
        if k:
            return drawn(f"pp/noise{k}", (1, 3, *size))[0]
        return scatter(drawn("pp/noise0", (4, 3, 64, 64)), CORNERS, size)

    denoiser = NetworkDenoiser(published_unet, Schedule(), late=1)
    latent = scatter(given["xt"], CORNERS, size)
    found = remove_seams(
        guided(denoiser, standard_guidance(2.0)), latent, places, contexts, noise, Refine()
    )
    wanted = scatter(given["out"], CORNERS, size)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_each_condition_stands_at_its_own_row_and_column():
    grid = torch.zeros(3, 2, 3)
    grid[0, 0, 0] = grid[1, 0, 2] = grid[2, 1, 0] = 1.0  # no two alike, not symmetric
    at = interpolated(grid, [(0, 0), (0, 32), (16, 0), (16, 32)], 16)
    assert torch.equal(at[0], torch.tensor([1.0, 0, 0]))
    assert torch.equal(at[1], torch.tensor([0, 1.0, 0]))
    assert torch.equal(at[2], torch.tensor([0, 0, 1.0]))
    assert not at[3].any()
    half = interpolated(grid, [(8, 0)], 16)[0]
    assert torch.allclose(half, torch.tensor([0.5**0.5, 0, 0.5**0.5]))


def test_averaging_keeps_what_all_windows_agree_on():
    canvas = torch.randn(3, 24, 40)
    places = windows((24, 40), 16, 4)
    found = averaged(lambda cut, _: 2 * cut, canvas, places, torch.rand(16, 16) + 0.1, 5)
    assert (found - 2 * canvas).abs().max() < 1e-5
