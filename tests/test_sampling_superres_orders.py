"""Super-resolution as orders: an upload in, windows that follow it, refusals with a cure."""

import dataclasses

import oracle
import pytest
import torch

from raylarge import order as orders
from raylarge.errors import UserError
from raylarge.models.denoiser import GaussianDenoiser
from raylarge.resample import downsample

PATCH = dataclasses.replace(oracle.PATCH, side_px=64)
CODEC = oracle.Unshuffle()


def a_picture(seed, rows, columns):
    """A smooth random image as the base64 of a PNG, and as floats."""
    import base64

    from raylarge import images
    from raylarge.resample import upsample

    source = torch.Generator().manual_seed(seed)
    small = torch.rand(3, rows // 4, columns // 4, generator=source) * 1.2 - 0.6
    picture = images.to_uint8(upsample(small, 4))
    return base64.b64encode(images.png_bytes(picture)).decode(), images.to_float(picture)


def test_an_order_makes_an_uploaded_image_larger():
    """The whole plan: PNG in, windows that follow it, blended decode out."""
    from raylarge.sampling import joint
    from raylarge.sampling.plan import run
    from raylarge.workers.worker import Worker

    worker = Worker(oracle.bundle(PATCH), GaussianDenoiser(0.0, 0.25))
    data, y = a_picture(1, 64, 96)
    order = orders.parse(
        {
            "size": "128x192",
            "algorithm": "superres",
            "source": {"image": data, "octaves": 1},
            "batch": 4,
            "chunk": 20,
        }
    )
    image = run(joint.plan(order, PATCH), worker.answer).image
    assert image.shape == (128, 192, 3)
    small = downsample(torch.from_numpy(image / 127.5 - 1).float().permute(2, 0, 1), 2)
    away = float((small - y).norm() / (y - y.mean()).norm())
    assert away < 0.35
    assert order.without_payload().source.image == ""


def test_inferred_embeddings_condition_each_window_at_its_place(tiny_bundle):
    """`inverted` in small: the grid's cells reach the windows that they lie under."""
    from raylarge.models.bundle import load
    from raylarge.sampling import joint
    from raylarge.sampling.plan import run
    from raylarge.sampling.tasks import EncodeContext, InvertImage
    from raylarge.workers.worker import Worker

    worker = Worker(load(tiny_bundle))
    data, _ = a_picture(2, 64, 128)
    order = orders.parse(
        {
            "size": "128x256",
            "algorithm": "superres",
            "source": {"image": data, "octaves": 1},
            "condition": {"kind": "inverted"},
            "sampler": {"steps": 1, "corrections": 1, "derivative": "difference"},
            "batch": 8,
        }
    )
    plan, kept = joint.plan(order, worker.bundle.patch), {}

    def answer(task, **inputs):
        reply = worker.answer(task, **inputs)
        if isinstance(task, InvertImage):
            kept["grid"] = reply
        if isinstance(task, EncodeContext):
            kept["windows"], kept["tokens"] = task.windows, reply
        return reply

    assert run(plan, answer).image.shape == (128, 256, 3)
    grid = kept["grid"]
    assert grid.shape == (8, 2, 4)  # two patches of the image, 2 x 2 base tiles under each
    for (row, column), tokens in zip(kept["windows"], kept["tokens"], strict=True):
        cell = grid[:, row : row + 1, column : column + 1][None]
        alone = worker.bundle.summarizer(cell, torch.tensor([0]))[0]
        assert torch.allclose(tokens, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"source": {"image": ""}}, "superres needs an image"),
        ({"source": {"octaves": 9}}, "source.octaves 9 must lie between 1 and"),
        ({"size": 65}, "must be multiples of 64: the image's sides of 32"),
        ({"condition": {"kind": "inverted"}, "size": 192}, "multiples of 128"),
        ({"condition": {"kind": "cdm"}}, "a condition that is null, embeddings or inverted"),
        ({"refine": True}, "order.refine would not be used"),
        ({"source": {"image": "!", "octaves": 1}}, "not the base64 of a PNG"),
        ({"size": "192x128"}, "the source has 64x96 px, an order of .* takes 96x64"),
    ],
)
def test_bad_superresolution_orders_are_refused(values, told):
    from raylarge.sampling import joint
    from raylarge.sampling.plan import run
    from raylarge.workers.worker import Worker

    data, _ = a_picture(1, 64, 96)
    source = {"image": data, "octaves": 1} | values.pop("source", {})
    order = {"size": "128x192", "algorithm": "superres", "source": source} | values
    worker = Worker(oracle.bundle(PATCH), GaussianDenoiser(0.0, 0.25))
    with pytest.raises(UserError, match=told):
        run(joint.plan(orders.parse(order), PATCH), worker.answer)
