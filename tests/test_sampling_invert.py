"""Inversion finds the condition again where it is known, alone or in company."""

import dataclasses

import pytest
import torch
from torch import nn

from raylarge.diffusion.noise import normal
from raylarge.diffusion.schedule import Schedule
from raylarge.errors import UserError
from raylarge.models.conditioner import Conditioner, normalise, read_cells
from raylarge.models.denoiser import GaussianDenoiser
from raylarge.models.summarizer import Summarizer
from raylarge.sampling import invert as inversion
from raylarge.sampling.invert import Inversion, Model, Places, denoising, invert, likeness

SHAPE = (8, 2, 2)
LATENT = (3, 8, 8)
PLACES = Places(seed=3, scale=1, windows=((0, 0), (0, 1), (2, 1)))


class Plain(nn.Module):
    """A conditioner that only normalises: its tokens are the embeddings."""

    def __init__(self, channels=SHAPE[0]):
        super().__init__()
        self.channels = channels

    def forward(self, grid, scale, size=None):
        return normalise(read_cells(grid, size, self.channels).values[:, : SHAPE[1] * SHAPE[2]])

    def null(self, count):
        return torch.zeros(count, SHAPE[1] * SHAPE[2], self.channels)


class GaussianUNet(nn.Module):
    """The exact network of the prior N(W tokens, variance): the best condition of z is known.

    The expected loss is proportional to |W tokens - z|^2 at every timestep.
    """

    def __init__(self, tokens, schedule, spread=1.0, variance=0.05):
        super().__init__()
        torch.manual_seed(0)
        self.mean = nn.Linear(tokens, LATENT[0] * LATENT[1] * LATENT[2], bias=False)
        nn.init.normal_(self.mean.weight, std=spread * tokens**-0.5)
        self.schedule, self.variance = schedule, variance

    def forward(self, x_t, t, context):
        mean = self.mean(context.flatten(1)).unflatten(1, LATENT)
        x_0 = GaussianDenoiser(mean, self.variance, self.schedule)(x_t, t, context)
        abar = self.schedule.at(t, x_t)
        eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
        return self.schedule.target(x_0, eps, t)


def a_model(prediction="epsilon", conditioner=None, dtype=torch.float32, spread=1.0):
    schedule = Schedule(prediction=prediction)
    conditioner = conditioner or Plain()
    width = conditioner(torch.randn(1, *SHAPE), torch.ones(1, dtype=torch.long)).numel()
    unet = GaussianUNet(width, schedule, spread)
    return Model(unet.to(dtype), conditioner.to(dtype), schedule, dtype)


def a_summarizer():
    torch.manual_seed(5)
    return Summarizer(channels=SHAPE[0], width=16, layers=1, heads=2, scales=4).eval()


def true_grids(count=3):
    return normalise(
        normal(SHAPE[1:] + SHAPE[:1], 11, "test", [(i,) for i in range(count)])
    ).movedim(-1, 1)


def latents_of(model, grids):
    """What the prior's mean is under each grid."""
    with torch.no_grad():
        tokens = model.conditioner(grids.to(model.dtype), torch.ones(len(grids), dtype=torch.long))
        return model.unet.mean(tokens.flatten(1)).unflatten(1, LATENT)


def losses(model, grid, latents, t=300):
    """The denoising loss under noise that the inversion did not see, averaged over draws."""
    found = []
    for draw in range(16):
        eps = normal(LATENT, 99, "test", [(draw, i) for i in range(len(latents))]).to(latents)
        found.append(denoising(model, grid.to(latents), latents, eps, t, PLACES.scale))
    return torch.stack(found).mean(dim=0).detach()


def cosines(a, b):
    """[i, j]: mean cosine between the tokens of a_i and b_j."""
    unit_a, unit_b = (nn.functional.normalize(x, dim=1).flatten(1) for x in (a, b))
    return unit_a @ unit_b.T / (a.shape[2] * a.shape[3])


def test_the_published_settings():
    how = Inversion()
    assert (how.iterations, how.rate, how.similarity) == (200, 0.1, 0.05)
    assert how.timesteps[:3] == [950, 945, 940]
    assert how.timesteps[-2:] == [54, 50]
    assert isinstance(Plain(), Conditioner)


def test_inversion_recovers_the_condition():
    model, true = a_model(), true_grids()
    latents = latents_of(model, true)
    found = invert(model, latents, SHAPE, PLACES, Inversion(similarity=0.0))
    near = cosines(found, true)
    others = near[~torch.eye(3, dtype=torch.bool)]
    assert near.diagonal().min() > 0.97, near
    assert near.diagonal().min() > others.max() + 0.3, near
    start = inversion._normalised(
        normal(SHAPE, 3, "inversion", [(1, 0, 0, 0), (1, 0, 1, 0), (1, 2, 1, 0)])
    )
    floor, before, after = (losses(model, grid, latents) for grid in (true, start, found))
    assert ((after - floor) < 0.05 * (before - floor)).all(), (before, after, floor)


def test_inversion_through_a_summarizer():
    """Nonlinear, with tokens of 8 channels among 65: nearer to the true ones than to others."""
    model, true = a_model(conditioner=a_summarizer(), spread=4.0), true_grids()
    latents = latents_of(model, true)
    found = invert(model, latents, SHAPE, PLACES)
    scales = torch.ones(3, dtype=torch.long)
    with torch.no_grad():
        tokens, wanted = (model.conditioner(grid, scales).flatten(1) for grid in (found, true))
    away = torch.cdist(tokens, wanted)
    others = away + 1e9 * torch.eye(3)
    assert (away.diagonal() < 0.5 * others.amin(dim=1)).all(), away


def test_the_similarity_prior_raises_the_mean_cosine():
    model = a_model()
    latents = latents_of(model, true_grids())
    free, published, strong = (
        likeness(invert(model, latents, SHAPE, PLACES, Inversion(similarity=weight)))
        for weight in (0.0, 0.05, 1.0)
    )
    assert (published > free).all()
    assert (strong > published).all()


def test_likeness_is_the_mean_over_all_pairs():
    grid = torch.randn(2, *SHAPE)
    cells = grid.flatten(2).mT
    pairs = nn.functional.cosine_similarity(cells[:, :, None], cells[:, None], dim=-1)
    assert torch.allclose(likeness(grid), pairs.mean(dim=(1, 2)))
    assert likeness(torch.randn(1, 8, 1, 1)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_what_the_network_predicts_does_not_matter(prediction):
    latents = latents_of(a_model(dtype=torch.float64), true_grids())
    how = Inversion(iterations=40)
    wanted = invert(a_model(dtype=torch.float64), latents, SHAPE, PLACES, how)
    found = invert(a_model(prediction, dtype=torch.float64), latents, SHAPE, PLACES, how)
    assert (found - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_company_does_not_matter(dtype):
    model = a_model(conditioner=a_summarizer(), dtype=dtype)
    latents = latents_of(model, true_grids())
    together = invert(model, latents, SHAPE, PLACES)
    for i, window in enumerate(PLACES.windows):
        place = dataclasses.replace(PLACES, windows=(window,))
        alone = invert(model, latents[i : i + 1], SHAPE, place)
        away = (alone[0] - together[i]).abs().max()
        assert away <= 1e-5


def test_the_loss_is_the_published_one():
    """Written out: the noise of the network itself, weighted by sqrt(abar) (1 - abar)."""
    model, grid = a_model(), true_grids()
    z, eps = torch.randn(3, *LATENT), torch.randn(3, *LATENT)
    abar = model.schedule.abar[400].float()
    x_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
    predicted = model.unet(x_t, 400, model.conditioner(grid, None))
    wanted = abar.sqrt() * (1 - abar) * ((predicted - eps) ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(denoising(model, grid, z, eps, 400, 1), wanted, rtol=1e-4)


@torch.no_grad()
def test_networks_stay_as_they_are_also_where_gradients_are_off():
    model = a_model(conditioner=a_summarizer())
    model.conditioner.pad_token.requires_grad_(False)
    before = {name: p.clone() for name, p in model.conditioner.named_parameters()}
    latents = latents_of(model, true_grids())
    found = invert(model, latents, SHAPE, PLACES, Inversion(iterations=3))
    again = invert(model, latents, SHAPE, PLACES, Inversion(iterations=3))
    assert torch.equal(found, again)
    assert not found.requires_grad
    for name, p in model.conditioner.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad == (name != "pad_token")
    assert torch.allclose(found.mean(dim=1), torch.zeros(3, 2, 2), atol=1e-6)
    assert torch.allclose(found.std(dim=1), torch.ones(3, 2, 2), atol=1e-6)


def test_other_places_other_seeds_other_draws():
    model = a_model()
    latents = latents_of(model, true_grids(1)).expand(2, -1, -1, -1)
    how = Inversion(iterations=2)
    pair = invert(model, latents, SHAPE, Places(3, 1, ((0, 0), (1, 0))), how)
    assert not torch.allclose(pair[0], pair[1], atol=0.1)
    other = invert(model, latents, SHAPE, Places(4, 1, ((0, 0), (1, 0))), how)
    assert not torch.allclose(pair, other, atol=0.1)


def test_what_does_not_fit_is_refused():
    model = a_model()
    latents = latents_of(model, true_grids())
    with pytest.raises(UserError, match="timesteps 0 to 999"):
        invert(model, latents, SHAPE, PLACES, Inversion(first=1000))
    with pytest.raises(UserError, match="at least 1 iteration"):
        invert(model, latents, SHAPE, PLACES, Inversion(iterations=0))
    with pytest.raises(UserError, match="embeddings have 4 channels"):
        invert(model, latents, (4, 2, 2), PLACES)
    with pytest.raises(ValueError, match="2 latents, but 3 places"):
        invert(model, latents[:2], SHAPE, PLACES)


def test_a_bundle_in_half_precision(tiny_bundle):
    from raylarge.models.bundle import load

    bundle = load(tiny_bundle, dtype=torch.bfloat16)
    model = Model(bundle.unet, bundle.summarizer, bundle.schedule, torch.bfloat16)
    latents = torch.randn(2, *bundle.patch.latent, dtype=torch.bfloat16)
    places = Places(0, 2, ((0, 0), (0, 1)))
    found = invert(model, latents, (8, 4, 4), places, Inversion(iterations=2))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    tokens = bundle.summarizer(found.bfloat16(), torch.full((2,), 2))
    assert tokens.shape == (2, 65, 64)
