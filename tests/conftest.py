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
    from raylarge.models.cdm import CDM
    from raylarge.models.light_autoencoder import LightAutoencoder
    from raylarge.models.summarizer import Summarizer

    torch.manual_seed(0)
    config = unet.UNetConfig(channels=(32, 64), attention=(False, True), layers=1, heads=4)
    parts = {
        "vae": LightAutoencoder(width=16, blocks=1),
        "unet": unet.build(config, (3, 16, 16), context=64),
        "summarizer": Summarizer(channels=8, width=64, layers=1, heads=4, scales=4),
        "cdm": CDM(channels=64, width=64, depth=1, heads=4, scales=4, learn_sigma=False),
    }
    folder = str(tmp_path_factory.mktemp("bundle"))
    bundle.save(folder, parts, {"patch_px": 64, "base_mpp": 0.5})
    return folder


@pytest.fixture
def one_thread():
    """One torch thread: as many as every worker has."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def law_order():
    """The order for answer independence, as JSON: 21 requests on `tiny_bundle`."""
    sampler = {"steps": 2, "derivative": "difference"}
    condition = {"kind": "cdm", "fine": "independent"}
    return {"size": "128x192", "batch": 1, "chunk": 1, "sampler": sampler, "condition": condition}


@pytest.fixture(scope="session")
def law_image(tiny_bundle, law_order):
    """What everybody's answer to `law_order` is held against: one process, one thread."""
    import torch

    from raylarge import order
    from raylarge.models import bundle
    from raylarge.sampling import joint, plan
    from raylarge.workers.worker import Worker

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = bundle.load(tiny_bundle)
    made = plan.run(joint.plan(order.parse(law_order), loaded.patch), Worker(loaded).answer)
    torch.set_num_threads(before)
    return made.image


@pytest.fixture(scope="session")
def shared_data():
    """Real slides and weights (not in the repository); without them a test is skipped."""
    folder = HERE.parents[1] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository: real slides are missing")
    return folder


@pytest.fixture(scope="session")
def tiny_slide(tmp_path_factory):
    """A procedural slide of 12 x 10 tiles of 64 px, with tissue in the middle."""
    from raylarge.slides import procedural

    path = str(tmp_path_factory.mktemp("slide") / "tiny.tif")
    procedural.write(path, (800, 660), seed=7)
    return path


@pytest.fixture
def tiny_prepare(tiny_slide, tmp_path):
    """Builds the config that prepares the tiny slide: scales 0 to 2, four blocks, toy encoder."""
    from raylarge import config
    from raylarge.data.prepare import Prepare

    small = {
        "slides": tiny_slide,
        "out": str(tmp_path / "data"),
        "tile": {
            "patch_px": 64,
            "scales": [0, 1, 2],
            "tissue": [0.3, 0.2],
            "crops": 8,
            "split": "band",
            "val_fraction": 0.35,
            "block_tiles": 30,
        },
        "embed": {"encoder": "toy", "batch": 8},
        "encode": {"batch": 8},
    }

    def build(**overrides):
        return config.build(Prepare, small, overrides)

    return build


@pytest.fixture(scope="session")
def small_examples(tiny_slide, tmp_path_factory):
    """A folder with examples of scales 0 to 2, a few buckets of small row groups."""
    from raylarge import config
    from raylarge.data.prepare import Prepare, prepare
    from raylarge.report import Report

    root = str(tmp_path_factory.mktemp("examples") / "data")
    tile = {"patch_px": 64, "scales": [0, 1, 2], "tissue": [0.3, 0.2], "block_tiles": 30}
    split = {"split": "band", "val_fraction": 0.35}
    values = {"slides": tiny_slide, "out": root, "tile": {**tile, **split}}
    more = {"embed": {"encoder": "toy"}, "shard": {"buckets": 3, "group_rows": 7}}
    prepare(config.build(Prepare, {**values, **more}), Report(root + "/report.json"))
    return root


@pytest.fixture(scope="session")
def ray_session():
    """A quiet Ray on this machine, with four logical CPUs."""
    import ray

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    patch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        logging_level="error",
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()
    patch.undo()


@pytest.fixture(scope="session")
def s3_bucket():
    """The URL of a bucket that a moto server holds on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "testing")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    boto3.client("s3").create_bucket(Bucket="raylarge")
    yield "s3://raylarge"
    server.stop()
    patch.undo()


@pytest.fixture
def words(tiny_bundle, law_order):
    """The command line of `jobs/sample.py` for the order of answer independence."""

    def flat(values, prefix):
        for key, value in values.items():
            name = f"{prefix}.{key}"
            yield from flat(value, name) if isinstance(value, dict) else [f"{name}={value}"]

    return [f"bundle={tiny_bundle}", *flat(law_order, "order")]
