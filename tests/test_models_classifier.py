import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from raylarge.errors import UserError
from raylarge.models import classifier
from raylarge.models.classifier import Classifier

NETWORKS = ("test_resnet", "test_efficientnet", "test_convnext", "densenet121")


def pixels(count=3, side=32):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, side, side, generator=generator) * 2 - 1


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_an_image_does_not_meet_its_neighbours(network):
    torch.manual_seed(0)
    made = classifier.build(network, ["a", "b", "c"], 32)
    assert made.training
    assert not [m for m in made.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    image = pixels()
    together = made(image)
    assert together.shape == (3, 3)
    torch.testing.assert_close(made(image[:1]), together[:1])
    torch.testing.assert_close(made.eval()(image), together)


@torch.no_grad()
def test_an_activation_joined_to_the_norm_stays():
    torch.manual_seed(0)
    made = classifier._grouped(timm.create_model("test_efficientnet", num_classes=2))
    old = timm.create_model("test_efficientnet", num_classes=2)
    norms = [m for m in old.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kinds = [type(norm.act) for norm in norms]
    found = [
        type(m[-1])
        for m in made.modules()
        if isinstance(m, nn.Sequential) and len(m) and isinstance(m[0], nn.GroupNorm)
    ]
    assert found == kinds
    assert nn.SiLU in kinds
    groups = [m for m in made.modules() if isinstance(m, nn.GroupNorm)]
    assert [m.num_channels for m in groups] == [norm.num_features for norm in norms]
    assert all(m.num_channels // m.num_groups >= min(16, m.num_channels) for m in groups)


@torch.no_grad()
def test_the_image_is_standardised_as_timm_says():
    torch.manual_seed(0)
    made = classifier.build("test_resnet", ["a", "b"], 32).eval()
    seen = []
    made.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    made(torch.ones(1, 3, 32, 32))
    known = made.body.pretrained_cfg
    wanted = [(1 - mean) / std for mean, std in zip(known["mean"], known["std"], strict=True)]
    torch.testing.assert_close(seen[0][0, :, 5, 5], torch.tensor(wanted))


@torch.no_grad()
def test_weights_with_batch_statistics_keep_them_frozen(tmp_path):
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", num_classes=7)
    for _ in range(3):
        theirs.train()(pixels(8))
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    made = classifier.build("test_resnet", ["a", "b"], 32, str(tmp_path / "theirs.safetensors"))
    assert made.config.frozen
    image = (pixels() + 1) / 2
    theirs.eval()
    torch.testing.assert_close(
        made.body.forward_features(image), theirs.forward_features(image), atol=1e-5, rtol=1e-4
    )
    assert made(pixels()).shape == (3, 2)
    torch.testing.assert_close(made(pixels())[:1], made(pixels(3)[:1]))


@torch.no_grad()
def test_it_is_kept_and_started_from_again(tmp_path):
    torch.manual_seed(0)
    made = classifier.build("test_resnet", ["a", "b"], 32).eval()
    made.save_pretrained(tmp_path)
    back = Classifier.from_pretrained(tmp_path).eval()
    assert torch.equal(back(pixels()), made(pixels()))
    assert list(back.config.classes) == ["a", "b"]
    path = str(tmp_path / "diffusion_pytorch_model.safetensors")
    again = classifier.build("test_resnet", ["a", "b"], 32, path)
    assert torch.equal(again(pixels()), made(pixels()))
    other = classifier.build("test_resnet", ["a", "b", "c"], 32, path)
    assert torch.equal(other.body.forward_features(pixels()), made.body.forward_features(pixels()))
    assert other(pixels()).shape == (3, 3)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("resnet81", "resnet81 is no network of timm; similar names: .*resnet"),
        ("hf-hub:someone/something", "is no network of timm"),
        ("vit_tiny_patch16_224", "does not take images of 32 px"),
    ],
)
def test_networks_that_do_not_fit_are_refused(network, said):
    with pytest.raises(UserError, match=said):
        classifier.build(network, ["a", "b"], 32)


def test_weights_of_another_network_are_refused(tmp_path):
    path = str(tmp_path / "other.safetensors")
    save_file(timm.create_model("test_convnext").state_dict(), path)
    with pytest.raises(UserError, match=r"these are not the weights of classifier\.network=test_r"):
        classifier.build("test_resnet", ["a", "b"], 32, path)
