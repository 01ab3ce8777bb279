import numpy as np
import pytest
import torch

from raylarge.models.mil import ABMIL


def network(gated=True, channels=5):
    torch.manual_seed(0)
    mil = ABMIL(channels, width=6, attention=4, classes=["a", "b", "c"], gated=gated)
    mil.standardise(torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels))
    return mil.eval()


def bags(*counts, channels=5, seed=0):
    """Padded with large numbers, which must not show."""
    rng = np.random.default_rng(seed)
    x = torch.full((len(counts), max(counts), channels), 1e4)
    for i, count in enumerate(counts):
        x[i, :count] = torch.from_numpy(rng.standard_normal((count, channels)).astype(np.float32))
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return x, mask


@pytest.mark.parametrize("gated", [True, False])
def test_it_is_the_papers_equations(gated):
    mil, (x, mask) = network(gated), bags(7)
    p = {name: value.double().numpy() for name, value in mil.state_dict().items()}
    h = [
        np.maximum(p["embed.weight"] @ ((k - p["mean"]) / p["deviation"]) + p["embed.bias"], 0)
        for k in x[0].double().numpy()
    ]
    # Ilse et al. 2018, Eq. 8 and 9, term by term.
    terms = []
    for h_k in h:
        inner = np.tanh(p["V.weight"] @ h_k)
        if gated:
            inner = inner * (1 / (1 + np.exp(-(p["U.weight"] @ h_k))))
        terms.append(np.exp(p["w.weight"][0] @ inner))
    a = [term / sum(terms) for term in terms]
    z = sum(a_k * h_k for a_k, h_k in zip(a, h, strict=True))  # Eq. 7
    with torch.no_grad():
        logits, attention = mil.pooled(mil.hidden(x), mask)
    np.testing.assert_allclose(attention[0], a, rtol=1e-5)
    np.testing.assert_allclose(logits[0], p["head.weight"] @ z + p["head.bias"], atol=1e-6)
    assert torch.equal(logits, mil(x, mask))
    assert np.ptp(a) > 0.01


@torch.no_grad()
def test_padding_has_no_attention_and_no_say():
    mil, (x, mask) = network(), bags(3, 9)
    logits, attention = mil.pooled(mil.hidden(x), mask)
    assert (attention[0, 3:] == 0).all()
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(2))
    alone = mil(x[:1, :3], mask[:1, :3])
    torch.testing.assert_close(logits[:1], alone)


@torch.no_grad()
def test_the_order_of_a_bag_does_not_matter():
    mil, (x, mask) = network(), bags(9)
    order = torch.from_numpy(np.random.default_rng(1).permutation(9))
    torch.testing.assert_close(mil(x[:, order], mask), mil(x, mask))
    assert not torch.allclose(mil(x[:, :5], mask[:, :5]), mil(x, mask))


def test_the_gradient_reaches_every_weight_and_is_finite():
    mil, (x, mask) = network(), bags(3, 9)
    mil(x, mask).square().sum().backward()
    for name, weight in mil.named_parameters():
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_a_channel_that_never_varies_is_only_centred():
    mil = ABMIL(2, 3, 2, ["a", "b"])
    mil.standardise(torch.tensor([5.0, 1.0]), torch.tensor([0.0, 2.0]))
    assert mil.deviation.tolist() == [1, 2]


@torch.no_grad()
def test_it_is_kept_with_its_statistics(tmp_path):
    mil, (x, mask) = network(), bags(4)
    mil.save_pretrained(tmp_path)
    back = ABMIL.from_pretrained(tmp_path).eval()
    assert torch.equal(back(x, mask), mil(x, mask))
    assert list(back.config.classes) == ["a", "b", "c"]
