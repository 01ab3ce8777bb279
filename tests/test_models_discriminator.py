"""The discriminator is pix2pix's but for its norm, and its two terms reach one network each."""

import pytest
import torch
from torch import nn

from raylarge.errors import UserError
from raylarge.models.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adversarial_loss,
    hinge_loss,
)

SMALL = DiscriminatorConfig(width=16, layers=2)


def pair(count=4, side=32):
    """Checks and noise."""
    draw = torch.Generator().manual_seed(0)
    lines = torch.arange(side) % 4 < 2
    checks = (lines[:, None] ^ lines[None]).float() * 2 - 1
    real = checks.expand(count, 3, side, side) + 0.1 * torch.randn(
        count, 3, side, side, generator=draw
    )
    return real, torch.randn(count, 3, side, side, generator=draw)


def test_it_is_the_published_one_in_size():
    with torch.device("meta"):
        network = Discriminator(DiscriminatorConfig())
    assert sum(p.numel() for p in network.parameters()) == 2_765_633
    assert network(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 1, 30, 30)


def test_a_score_is_of_its_own_image_alone():
    torch.manual_seed(0)
    network = Discriminator(SMALL)
    real, made = pair()
    together = network(torch.cat([real, made]))
    alone = torch.cat([network(image[None]) for image in torch.cat([real, made])])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())
    assert list(network.buffers()) == []


def test_hinge_is_of_the_margin():
    real, made = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    told = hinge_loss(real.view(3, 1, 1, 1), made.view(3, 1, 1, 1))
    assert told.tolist() == [0.0, 1.0, 3.0]


def test_each_term_reaches_its_own_network():
    torch.manual_seed(0)
    network = Discriminator(SMALL)
    real, made = pair()
    made.requires_grad_()
    adversarial_loss(network, real, made, 0.25).sum().backward()
    both = [p.grad.clone() for p in network.parameters()], made.grad.clone()
    network.zero_grad()
    made.grad = None
    hinge_loss(network(real), network(made.detach())).sum().backward()
    assert made.grad is None
    for together, alone in zip(both[0], [p.grad for p in network.parameters()], strict=True):
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)
    network.requires_grad_(False)
    (-0.25 * network(made).flatten(1).mean(dim=1)).sum().backward()
    torch.testing.assert_close(both[1], made.grad)
    assert made.grad.abs().max() > 0


def test_it_learns_to_tell():
    torch.manual_seed(0)
    network = Discriminator(SMALL)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    real, made = pair()
    for _ in range(30):
        optimizer.zero_grad()
        adversarial_loss(network, real, made, 1.0).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert hinge_loss(network(real), network(made)).max() < 0.2


@pytest.mark.parametrize(
    ("width", "layers", "side"), [(24, 2, 64), (0, 2, 64), (16, 0, 64), (16, 3, 23)]
)
def test_sizes_that_cannot_be(width, layers, side):
    with pytest.raises(UserError, match=f"width {width} and {layers} layers.*of {side} px"):
        DiscriminatorConfig(width, layers).check(side)


def test_the_smallest_image_has_one_patch():
    DiscriminatorConfig(16, 3).check(24)
    with torch.device("meta"):
        network = Discriminator(DiscriminatorConfig(16, 3))
    assert network(torch.empty(1, 3, 24, 24, device="meta")).shape == (1, 1, 1, 1)
