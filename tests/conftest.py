"""Fixtures that several test modules share."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def parity():
    """Figures made by the papers' published code (tests/data/parity/README.md)."""
    return HERE / "data" / "parity"


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """A complete bundle with small random networks, 8-channel embeddings, scales 0 to 3."""
    import torch

    from raylarge.models import bundle, unet
    from raylarge.models.autoencoder import LightAutoencoder
    from raylarge.models.cdm import CDM
    from raylarge.models.summarizer import Summarizer

    torch.manual_seed(0)
    config = unet.UNetConfig(channels=(32, 64), attention=(False, True), layers=1, heads=4)
    parts = {
        "vae": LightAutoencoder(width=16, blocks=1),
        "unet": unet.build(config, (3, 16, 16), context=64),
        "summarizer": Summarizer(channels=8, width=64, layers=1, heads=4, scales=4),
        "cdm": CDM(channels=64, width=64, depth=1, heads=4, scales=4),
    }
    folder = str(tmp_path_factory.mktemp("bundle"))
    bundle.save(folder, parts, {"patch_px": 64})
    return folder
