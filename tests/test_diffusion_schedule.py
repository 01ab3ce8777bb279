"""Schedules and steps against the published figures (published parity), and algebra."""

import json

import numpy as np
import pytest
import torch

from raylarge.diffusion.loss import min_snr_weights, training_draws
from raylarge.diffusion.noise import generator, normal
from raylarge.diffusion.schedule import Schedule
from raylarge.diffusion.solvers import solve
from raylarge.diffusion.steps import ddim
from raylarge.models.cdm import sinusoid


@pytest.fixture(scope="module")
def figures(parity):
    return np.load(parity / "samplers.npz")


def test_the_schedule_is_the_published_one(figures):
    schedule = Schedule()
    assert np.abs(schedule.betas.numpy() - figures["betas"]).max() <= 1e-6
    assert np.abs(schedule.abar.numpy() - figures["alphas_cumprod"]).max() <= 1e-6
    steps = schedule.steps(50)
    assert [step.t for step in steps] == sorted(figures["ts50"].tolist(), reverse=True)
    assert np.abs([s.abar_prev for s in steps[::-1]] - figures["alphas_prev"]).max() <= 1e-6


@pytest.mark.parametrize("count", [10, 50])
@pytest.mark.parametrize("solver", ["ddim", "plms"])
def test_guided_solvers_equal_the_published_samples(figures, solver, count):
    """The figures' analytic model, guidance 2.0 as u + w (c - u), eta 0."""
    schedule = Schedule()
    x_t, c = torch.from_numpy(figures["xT"]), torch.from_numpy(figures["cond"])[..., None, None]

    def denoise(x, t):
        eps = 0.5 * torch.tanh(x) + 1e-4 * t + 2.0 * (0.1 * c)
        return schedule.x_0(x, eps, t)

    found = solve(denoise, x_t, schedule, solver, count).numpy()
    published = figures[f"{solver}{count}"]  # values of up to 190: relative to the largest
    assert np.abs(found - published).max() <= 1e-6 * np.abs(published).max()


def test_the_timestep_embedding_is_the_published_one(figures):
    """To a half unit of the frequency's last place, which the angle t f multiplies by t.

    The figures stand as far from float64 (3.2e-5 at t = 1000) as from any float32.
    """
    for t, wanted in zip([0, 1, 500, 1000], figures["temb"], strict=True):
        made = sinusoid(torch.tensor([t]), 192, sine_first=False)[0].numpy()
        assert np.abs(made - wanted).max() <= 1e-7 + t * 2**-24


@pytest.mark.parametrize(("solver", "better"), [("plms", 4), ("dpm++", 8), ("unipc", 8)])
def test_higher_orders_come_closer_to_the_exact_solution(solver, better):
    """On the prior N(0, 1/4) the probability flow is a known scaling of x_T."""
    schedule, x_t, v = Schedule(), torch.randn(1, 64, dtype=torch.float64), 0.25

    def denoise(x, t):
        abar = schedule.at(t, x)
        return abar.sqrt() * v / (abar * v + 1 - abar) * x

    def exact(t):  # std of x_0 over std of x_t, along the flow
        abar = float(schedule.abar[t])
        return x_t * (v / (abar * v + 1 - abar)) ** 0.5

    first = schedule.steps(20)[0].t
    wanted = exact(first)

    def miss(name, count):
        return float((solve(denoise, x_t, schedule, name, count) - wanted).abs().max())

    assert miss(solver, 20) * better < miss("ddim", 20)
    assert miss("ddim", 200) < miss("ddim", 20)


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
@pytest.mark.parametrize("name", ["scaled_linear", "squaredcos", "linear"])
def test_every_count_that_fits_is_walked(solver, name):
    """Neighbouring noise levels may share a timestep."""
    schedule, x_t, v = Schedule(name), torch.randn(1, 16, dtype=torch.float64), 0.25

    def denoise(x, t):
        abar = schedule.at(t, x)
        return abar.sqrt() * v / (abar * v + 1 - abar) * x

    last = float(schedule.abar[-1])
    wanted = x_t * (v / (last * v + 1 - last)) ** 0.5
    for count, close in [(1, 2.0), (20, 0.1), (100, 0.02), (781, 0.02), (999, 0.02)]:
        found = solve(denoise, x_t, schedule, solver, count)
        assert (found - wanted).abs().max() <= close * wanted.abs().max()
    with pytest.raises(ValueError, match="1000 steps do not fit"):
        solve(denoise, x_t, schedule, solver, 1000)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match=r"no solver 'euler'; choose one of: ddim, plms, dpm"):
        solve(lambda x, t: x, torch.zeros(1, 1), Schedule(), "euler", 5)


def test_respaced_and_strided_walks():
    schedule = Schedule()
    walk = schedule.respaced(200)
    assert ([s.t for s in walk[-3:]], walk[0].t, walk[-1].abar_prev) == ([10, 5, 0], 999, 1.0)
    walk = schedule.strided(299, 50)
    assert [step.t for step in walk] == [299, 249, 199, 149, 99, 49]
    assert walk[-1].abar_prev == float(schedule.abar[0])
    assert [s.t + 1 for s in schedule.strided(999, 50)][::19] == [1000, 50]
    for bad in (lambda: schedule.respaced(1), lambda: schedule.strided(1000, 50)):
        with pytest.raises(ValueError, match=r"do(es)? not fit"):
            bad()


def test_sigma_at_eta_one_is_the_published_one(figures):
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    sigmas = [float(ddim(zero, zero, step, 1.0, one)) for step in Schedule().steps(50)]
    assert np.abs(sigmas[::-1] - figures["sigmas_eta1"].squeeze()).max() <= 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_target_implies_the_clean_sample(prediction):
    schedule = Schedule(prediction=prediction)
    x_0, eps, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 20, 500, 900])
    x_t = schedule.noised(x_0, eps, t)
    found = schedule.x_0(x_t, schedule.target(x_0, eps, t), t)
    assert (found - x_0).abs().max() < 1e-3


@pytest.mark.parametrize("count", [0, 1000])
def test_steps_that_do_not_fit_are_refused(count):
    with pytest.raises(ValueError, match="steps do not fit"):
        Schedule().steps(count)


def test_noise_is_a_function_of_its_address():
    here = normal((3, 4), 7, "sampling", [(0, 1, 2, 3), (0, 1, 2, 4)])
    again = normal((3, 4), 7, "sampling", [(0, 1, 2, 4)])
    assert torch.equal(here[1], again[0])
    assert not torch.equal(here[0], here[1])
    others = [
        (8, "sampling", (0, 1, 2, 3)),
        (7, "flip", (0, 1, 2, 3)),
        (7, "sampling", (1, 0, 2, 3)),
    ]
    for seed, stream, address in others:
        assert not torch.equal(normal((3, 4), seed, stream, [address])[0], here[0])
    many = normal((64, 64), 1, "x", [(i,) for i in range(50)])
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01
    neighbours = many.flatten(1)
    assert abs(float((neighbours[:-1] * neighbours[1:]).mean())) < 0.01


@pytest.mark.parametrize("address", [(-1,), (1 << 32,), (0,) * 7])
def test_an_address_out_of_range_is_refused(address):
    with pytest.raises(ValueError, match="noise address"):
        generator(0, "x", *address)


def test_draws_belong_to_samples_not_to_batches():
    whole = training_draws(torch.arange(6), (2, 3), 5, "ldm", 1000)
    part = training_draws(torch.tensor([4, 1]), (2, 3), 5, "ldm", 1000)
    for one, other in zip(whole, part, strict=True):
        assert torch.equal(one[[4, 1]], other)


def test_stratified_timesteps_fill_the_schedule_evenly_from_any_sample_on():
    for first in (0, 12345, 2**50):
        t = training_draws(
            torch.arange(first, first + 100), (1,), 5, "ldm", 1000, stratified=True
        ).t
        counts = torch.bincount(t // 50, minlength=20)  # 5 in each twentieth
        assert counts.min() >= 4
        assert counts.max() <= 6
    other = training_draws(torch.arange(100), (1,), 6, "ldm", 1000, stratified=True).t
    assert (
        other != training_draws(torch.arange(100), (1,), 5, "ldm", 1000, stratified=True).t
    ).any()


def test_stratified_draws_belong_to_samples_and_change_timesteps_alone():
    plain = training_draws(torch.arange(6), (2, 3), 5, "ldm", 1000)
    whole = training_draws(torch.arange(6), (2, 3), 5, "ldm", 1000, stratified=True)
    part = training_draws(torch.tensor([4, 1]), (2, 3), 5, "ldm", 1000, stratified=True)
    assert torch.equal(whole.t[[4, 1]], part.t)
    assert torch.equal(whole.eps, plain.eps)
    assert torch.equal(whole.coin, plain.coin)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_the_error_of_x_0_alike_whatever_is_predicted(prediction):
    schedule, t = Schedule(prediction=prediction), torch.tensor([3, 300, 999])
    abar = schedule.abar[t]
    snr = abar / (1 - abar)
    x_0, x_t = torch.zeros(3, 1), torch.zeros(3, 1)
    output = torch.full((3, 1), 0.1)
    wrong = schedule.x_0(x_t, output, t)  # of a prediction that is off by 0.1
    weighted = min_snr_weights(schedule, t, 5.0) * 0.1**2
    expected = snr.clamp(max=5.0) * wrong.flatten().double().square()
    torch.testing.assert_close(weighted.double(), expected, rtol=1e-4, atol=0)
    assert torch.equal(x_0, schedule.x_0(x_t, torch.zeros(3, 1), t))


def test_the_published_average(parity):
    trace = json.loads((parity / "meta.json").read_text())["ema_trace_0_to_1"]
    value, found = 0.0, []
    for n in range(1, len(trace) + 1):
        decay = min(0.9999, (1 + n) / (10 + n))
        value = decay * value + (1 - decay)
        found.append(value)
    assert np.abs(np.array(found) - np.array(trace)).max() <= 1e-6
