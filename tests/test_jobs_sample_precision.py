"""jobs/sample.py in half precision, in this process: every algorithm, close to float32."""

import io

import numpy as np
import pytest
import torch
from bundles import conditioners, networks, small_unet
from diffusers import ControlNetModel
from PIL import Image

from jobs import sample as job
from raylarge import images
from raylarge.models import bundle
from raylarge.models.cdm import CDM
from raylarge.models.prior import GridPrior
from raylarge.order import Condition

HALVES = ("bfloat16", "float16")
VECTOR = Condition.of_vector(np.linspace(-1, 1, 5, dtype=np.float32)).data
EMBEDDING = Condition.of(np.linspace(-1, 1, 4 * 4 * 8, dtype=np.float32).reshape(4, 4, 8)).data
JOINT = ["order.size=64", "order.batch=4", "order.condition.kind=cdm"]
ORDERS = {
    "patches": ["order.count=2", "order.scale=1", "order.condition.kind=cdm"],
    "patches, another solver": ["order.count=2", "order.sampler.solver=dpm++"],
    "joint": [*JOINT, "order.condition.fine=independent"],
    "joint, released": [*JOINT, "order.recipe=released", "order.sampler.corrections=1"],
    "joint, mosaic": [*JOINT, "order.sampler.constraint=mosaic"],
    "joint, backprop": [*JOINT, "order.sampler.correction=backprop"],
    "joint, small codec": [*JOINT, "order.sampler.small_autoencoder=true"],
    "joint, seams removed": [*JOINT, "order.refine=true"],
    "joint, cascade": [*JOINT, "order.size=128", "order.levels=2,1,0"],
    "joint, inversion": [
        *JOINT,
        "order.condition.fine=inversion",
        "order.condition.iterations=2",
    ],
    "joint, embeddings": [
        "order.size=128",
        "order.condition.kind=embeddings",
        f"order.condition.data={EMBEDDING}",
        "order.condition.shape=[4,4,8]",
    ],
    "joint, prior": [
        "order.size=64",
        "order.condition.kind=prior",
        f"order.condition.data={VECTOR}",
        "order.condition.shape=[5]",
        "order.condition.prior_steps=2",
    ],
    "strided": ["order.size=64", "order.algorithm=strided"],
    "superres": ["image={image}", "order.source.octaves=1"],
    "superres, inverted": [
        "image={image}",
        "order.source.octaves=1",
        "order.condition.kind=inverted",
        "order.condition.iterations=2",
    ],
    "superres, ControlNet": [
        "image={image}",
        "order.source.octaves=1",
        "order.source.control=true",
    ],
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """A bundle that has every part, and an image to make larger."""
    root = tmp_path_factory.mktemp("precision")
    torch.manual_seed(0)
    unet = small_unet()
    cdm = CDM(16, width=16, depth=1, heads=2, scales=3, learn_sigma=False, standardised=True)
    parts = {"vae": networks()["light"], "vae_small": networks()["tiny"], "unet": unet}
    parts |= {"summarizer": conditioners()["vit"], "cdm": cdm}
    parts["prior"] = GridPrior(channels=8, vector=5, width=16, blocks=1)
    parts["controlnet"] = ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=(8, 16, 32)
    )
    bundle.save(str(root / "bundle"), parts, {"patch_px": 32})
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32)).save(sink, format="PNG")
    (root / "small.png").write_bytes(sink.getvalue())
    return root


@pytest.fixture(scope="module")
def drawn(everything):
    """Returns the pixels of a named order in a precision; each is computed once."""
    images_of = {}

    def draw(name, dtype):
        if (name, dtype) not in images_of:
            out = everything / f"{list(ORDERS).index(name)}-{dtype}"
            words = [word.format(image=everything / "small.png") for word in ORDERS[name]]
            places = [f"bundle={everything / 'bundle'}", f"out={out}", f"dtype={dtype}"]
            job.main([*places, "order.sampler.steps=2", *words])
            images_of[name, dtype] = images.read_png(str(out / "image.png"))[0].astype(float)
        return images_of[name, dtype]

    return draw


def soaked(name, dtype):
    """Both types for all orders take long: `make test` has each order once."""
    both = {"patches", "joint", "superres"}
    marks = () if dtype == "bfloat16" or name in both else pytest.mark.slow
    return pytest.param(name, dtype, marks=marks)


@pytest.mark.parametrize(
    ("name", "dtype"), [soaked(name, dtype) for name in ORDERS for dtype in HALVES]
)
def test_half_precision_is_close_to_float32(drawn, name, dtype):
    exact, half = drawn(name, "float32"), drawn(name, dtype)
    assert exact.std() > 1
    difference = np.abs(half - exact)
    assert difference.mean() <= (8 if dtype == "bfloat16" else 2), difference.mean()
