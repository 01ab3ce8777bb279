"""The grid prior learns, and draws by address."""

import pytest
import torch

from raylarge.errors import UserError
from raylarge.models.prior import GridPrior, GridSampling

LEFT, RIGHT, NULL = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2)
ADDRESSES = [(0, k) for k in range(64)]


def means():
    """Raw class means: class 0 is bright on the left, class 1 on the right, in half the channels.

    Every channel has a mean and a size of its own; the top row is dimmer, so rows are not columns.
    """
    sign = torch.tensor([1.0, -1.0])[:, None, None, None]
    columns = torch.tensor([1.0, 1.0, -1.0, -1.0])
    rows = torch.tensor([0.5, 1.0, 1.0, 1.0])[:, None]
    pattern = torch.zeros(2, 8, 4, 4)
    pattern[:, :4] = 0.5 * sign * rows * columns
    size = torch.linspace(2, 8, 8)[:, None, None]
    return size * pattern + 10 * torch.arange(8.0)[:, None, None]


def grids(labels, generator):
    noise = torch.randn(len(labels), 8, 4, 4, generator=generator)
    return means()[labels] + torch.linspace(2, 8, 8)[:, None, None] * noise


@pytest.fixture(scope="module")
def trained():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    prior = GridPrior(channels=8, vector=2, width=32, blocks=2)
    one_hot = torch.eye(2)
    labels = torch.arange(512) % 2
    prior.standardise(grids(labels, generator), one_hot[labels])
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=300)
    for _ in range(300):
        labels = torch.randint(2, (64,), generator=generator)
        x_0 = prior.to_standard(grids(labels, generator))
        kept = torch.rand(64, 1, generator=generator) > 0.15
        t = torch.randint(1000, (64,), generator=generator)
        x_t = prior.schedule.noised(x_0, torch.randn(x_0.shape, generator=generator), t)
        loss = (prior(x_t, t, one_hot[labels] * kept) - x_0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()
    torch.set_num_threads(threads)
    return prior.eval()


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    prior = GridPrior(channels=4, vector=3, width=32, blocks=1)
    torch.nn.init.normal_(prior.grid_out.weight, std=0.1)
    return prior


def leftness(prior, found):
    """How far standardised grids lie along class 0 minus class 1; about 1 and -1 at the means."""
    axis = prior.to_standard(means())
    axis = (axis[0] - axis[1])[None] / 2
    middle = prior.to_standard(means()).mean(dim=0, keepdim=True)
    along = ((prior.to_standard(found) - middle) * axis).sum(dim=(1, 2, 3))
    return (along / axis.square().sum()).mean().item()


def test_draws_look_like_their_class_with_rows_before_columns(trained):
    for label, vector in enumerate((LEFT, RIGHT)):
        many = [(label, k) for k in range(256)]
        mean = trained.draw(vector, 0, many, steps=25).mean(dim=0)
        error = [(mean - other).square().mean() for other in means()]
        turned = (mean - means()[label].mT).square().mean()
        assert error[label] < 0.2 * error[1 - label]
        assert error[label] < 0.3 * turned


def test_draws_have_the_spread_of_the_data(trained):
    spread = trained.draw(LEFT, 0, ADDRESSES).std(dim=0).mean(dim=(1, 2))
    assert ((spread / torch.linspace(2, 8, 8)) - 1).abs().max() < 0.3


def test_the_ancestral_walk_finds_the_class_too(trained):
    found = trained.sample(LEFT, 0, ADDRESSES[:8], GridSampling(steps=999, eta=1.0))
    assert leftness(trained, found) == pytest.approx(1.0, abs=0.25)
    again = trained.sample(LEFT, 0, ADDRESSES[:2], GridSampling(steps=20, eta=1.0))
    alone = trained.sample(LEFT, 0, ADDRESSES[1:2], GridSampling(steps=20, eta=1.0))
    assert torch.allclose(again[1:], alone, rtol=1e-5, atol=1e-4)


def test_guidance_sharpens_and_a_negative_vector_pushes_away(trained):
    def drawn(vector, **how):
        return leftness(trained, trained.draw(vector, 0, ADDRESSES, steps=20, **how))

    plain = drawn(LEFT)
    sharp = drawn(LEFT, guidance=2.0)
    pushed = drawn(LEFT, guidance=2.0, negative=RIGHT)
    assert plain == pytest.approx(1.0, abs=0.2)
    assert pushed > sharp + 0.1 > plain + 0.2
    assert drawn(NULL, guidance=3.0, negative=LEFT) < -0.3
    assert drawn(LEFT, negative=RIGHT) == plain  # at w = 1 there is nothing to push with


def test_a_draw_is_a_function_of_its_address(untrained):
    vectors = torch.randn(3, 3)
    at = [(1, 0, 0), (1, 0, 1), (2, 0, 1)]
    for w, dtype, rounding in ((1.0, torch.float32, 1e-5), (3.0, torch.float64, 1e-12)):
        prior, rows = untrained.to(dtype), vectors.to(dtype)
        together = prior.draw(rows, 7, at, steps=5, guidance=w)
        assert torch.equal(together, prior.draw(rows, 7, at, steps=5, guidance=w))
        alone = prior.draw(rows[1:2], 7, at[1:2], steps=5, guidance=w)
        assert torch.allclose(together[1], alone[0], rtol=0, atol=rounding)
    vectors = vectors.to(torch.float64)
    same = untrained.draw(vectors[:1], 7, at, steps=5)
    assert not any(torch.allclose(same[i], same[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not torch.allclose(same, untrained.draw(vectors[:1], 8, at, steps=5))


def test_grids_of_any_shape_and_the_null_condition(untrained):
    found = untrained.sample(torch.ones(1, 3), 0, [(0,)], GridSampling(steps=2, shape=(2, 7)))
    assert found.shape == (1, 4, 2, 7)
    assert (
        untrained(torch.randn(2, 4, 1, 1), torch.tensor([0, 999]), torch.ones(2, 3))
        .isfinite()
        .all()
    )
    x_t, t = torch.randn(1, 4, 4, 4), torch.tensor([500])
    before = untrained(x_t, t, torch.zeros(1, 3))
    untrained.standardise(torch.randn(9, 4, 4, 4), 5 + 2 * torch.randn(9, 3))
    assert torch.equal(untrained(x_t, t, torch.zeros(1, 3)), before)  # no mean is taken from null
    assert not torch.allclose(untrained(x_t, t, torch.ones(1, 3)), before)


def test_a_new_prior_predicts_the_mean():
    prior = GridPrior(channels=4, vector=3, width=16, blocks=1)
    raw = 3 + 2 * torch.randn(64, 4, 4, 4)
    prior.standardise(raw, torch.ones(64, 3))  # a constant condition: nothing is divided by zero
    x_0 = prior.to_standard(raw)
    assert x_0.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (x_0.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-5
    assert (prior(x_0, torch.zeros(64), torch.ones(64, 3)) == 0).all()
    assert (prior.schedule.name, prior.schedule.prediction) == ("linear", "sample")


def test_wrong_vectors_are_refused_with_the_cure(untrained):
    with pytest.raises(UserError, match=r"has 5 features, the grid prior needs 3; give vectors"):
        untrained.draw(torch.ones(1, 5), 0, [(0,)])
    with pytest.raises(UserError, match="has 2 features"):
        untrained.draw(torch.ones(1, 3), 0, [(0,)], negative=torch.ones(1, 2))
    with pytest.raises(UserError, match="2 conditions for 3 grids"):
        untrained.draw(torch.ones(2, 3), 0, [(0,), (1,), (2,)])


def test_a_prior_comes_back_from_its_folder(untrained, tmp_path):
    untrained.standardise(torch.randn(9, 4, 4, 4), torch.randn(9, 3))
    untrained.save_pretrained(tmp_path)
    again = GridPrior.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    vector = torch.randn(1, 3)
    before = untrained.draw(vector, 0, [(0,)], steps=3, guidance=2.0)
    assert torch.equal(again.draw(vector, 0, [(0,)], steps=3, guidance=2.0), before)
