"""LPIPS is the package's own, on a backbone from a file, and what is missing is named."""

import sys

import lpips
import pytest
import torch

from raylarge.errors import UserError
from raylarge.models.perceptual import SMALLEST, FeatureDistance, Perceptual

SIZES = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 512)]
SIZES += [(512, 512)] * 5
PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def vgg():
    """Random weights under torchvision's names, and one of the classifier that is left out."""
    draw = torch.Generator().manual_seed(0)
    state = {"classifier.6.bias": torch.zeros(1000)}
    for place, (before, after) in zip(PLACES, SIZES, strict=True):
        weight = torch.randn(after, before, 3, 3, generator=draw) * (2 / (9 * before)) ** 0.5
        state |= {f"features.{place}.weight": weight, f"features.{place}.bias": torch.zeros(after)}
    return state


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(vgg(), path)
    return str(path)


@pytest.fixture(scope="module")
def network(backbone):
    return Perceptual(backbone)


def pairs(count=2, side=32):
    draw = torch.Generator().manual_seed(1)
    image = torch.rand(count, 3, side, side, generator=draw) * 2 - 1
    return image, (image + 0.3 * torch.randn(image.shape, generator=draw)).clamp(-1, 1)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_it_is_the_packages_distance(network):
    image, reference = pairs()
    found = network(image, reference)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    slices = {name: vgg()[f"features.{name.split('.', 1)[1]}"] for name in theirs.net.state_dict()}
    theirs.net.load_state_dict(slices)
    torch.testing.assert_close(found, theirs(image, reference).flatten())
    assert found.shape == (2,)
    assert (found > 0.01).all()


def test_it_is_fixed_of_each_pair_alone_and_has_derivatives(network):
    image, reference = pairs(side=SMALLEST)
    image.requires_grad_()
    found = network(image, reference)
    alone = torch.cat([network(image[i : i + 1], reference[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-5)
    assert network(image, image).abs().max() == 0
    found.sum().backward()
    assert image.grad.abs().max() > 0
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(part.training for part in network.modules())


def test_another_network_is_refused(tmp_path, backbone):
    state = vgg()
    del state["features.28.weight"]
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(UserError, match=r"torchvision's VGG16: 1 missing \(features.28.weight\)"):
        Perceptual(str(tmp_path / "vgg.pth"))
    with pytest.raises(UserError, match="no weights at"):
        Perceptual(str(tmp_path / "nothing.pth"))


def test_without_the_package_the_extra_is_named(monkeypatch, backbone):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"pip install 'raylarge\[eval\]'"):
        Perceptual(backbone)


def test_the_backbone_comes_from_torchvisions_cache_or_the_cure_is_told(
    monkeypatch, tmp_path, backbone, network
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(UserError, match=r"could not be loaded.*lpips_backbone=/path/to/vgg16"):
        Perceptual()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "vgg16-397923af.pth").symlink_to(backbone)
    image, reference = pairs()
    assert torch.equal(Perceptual()(image, reference), network(image, reference))


def test_features_see_lost_detail_and_shifts_that_pixels_do_not():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    distance = FeatureDistance()
    assert distance(image, image).abs().max() < 1e-9
    blurred = torch.nn.functional.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    brighter = image + (image - blurred).abs().mean()  # as far in pixels
    assert (distance(blurred, image) > 3 * distance(brighter, image)).all()


def test_the_distance_of_features_reaches_the_image_alone():
    image, reference = (torch.rand(1, 3, 32, 32).requires_grad_() for _ in range(2))
    FeatureDistance()(image, reference).sum().backward()
    assert image.grad.abs().sum() > 0
    assert reference.grad is None
