"""Watching a training: trackers, losses told apart, and the meter."""

import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raylarge import images, storage
from raylarge.errors import UserError
from raylarge.train.estimate import memory
from raylarge.train.monitor import meter, progress
from raylarge.train.monitor import trackers as watch
from raylarge.train.monitor.bins import Bins
from raylarge.train.monitor.meter import Meter
from raylarge.train.monitor.trackers import TrackedRun, track

CONFIG = {"model": "ldm", "ldm": {"layers": 2}}
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def events(content):
    """The events of one file: length, its checksum, data, their checksum."""
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + size])
        at += 12 + size + 4


def shown(contents):
    """What TensorBoard shows of files in order: a session's start hides steps from its own on."""
    found = []
    for event in (event for content in contents for event in events(content)):
        if event.HasField("session_log"):
            assert event.session_log.status == event.session_log.START
            found = [one for one in found if one[0] < event.step]
        found += [(event.step, value) for value in event.summary.value]
    return found


def curve_of(contents, tag):
    return [(step, value.simple_value) for step, value in shown(contents) if value.tag == tag]


def local(root):
    return [path.read_bytes() for path in sorted(Path(root, watch.EVENTS).iterdir())]


def test_a_resumed_run_does_not_double_its_curve(tmp_path):
    killed = track("tensorboard", TrackedRun(str(tmp_path), "a run", CONFIG))
    for step in (10, 20, 30, 40):
        killed.scalars(step, {"loss/scale 3": step / 8})
    resumed = track("tensorboard", TrackedRun(str(tmp_path), "a run", CONFIG, step=20))
    resumed.scalars(30, {"loss/scale 3": 1.0})
    resumed.close()
    assert curve_of(local(tmp_path), "loss/scale 3") == [(10, 1.25), (20, 2.5), (30, 1.0)]
    assert len(local(tmp_path)) == 2
    anew = track("tensorboard", TrackedRun(str(tmp_path), "a run", CONFIG))
    anew.scalars(10, {"loss/scale 3": 9.0})
    assert curve_of(local(tmp_path), "loss/scale 3") == [(10, 9.0)]


def test_a_picture_comes_back_as_it_was(tmp_path):
    tracker = track("tensorboard", TrackedRun(str(tmp_path), "a run", CONFIG))
    tracker.picture(50, "sheet", PICTURE)
    [(step, value)] = shown(local(tmp_path))
    assert (step, value.tag, value.image.height, value.image.width) == (50, "sheet", 4, 6)
    np.testing.assert_array_equal(images.from_bytes(value.image.encoded_image_string), PICTURE)


@pytest.mark.s3
def test_events_reach_a_bucket_with_every_flush(s3_bucket, monkeypatch):
    root = f"{s3_bucket}/watch/run"
    tracker = track("tensorboard", TrackedRun(root, "a run", CONFIG))

    def there():
        found = storage.children(storage.join(root, watch.EVENTS))
        return [storage.read_bytes(path) for path in found]

    tracker.scalars(10, {"loss": 0.5})
    assert curve_of(there(), "loss") == []  # copied now and then
    tracker.flush()
    assert curve_of(there(), "loss") == [(10, 0.5)]
    monkeypatch.setattr(watch, "LARGE_BYTES", 1)  # a new file from each flush on
    for step in (20, 30):
        tracker.scalars(step, {"loss": 0.25})
        tracker.flush()
    tracker.scalars(40, {"loss": 0.125})
    tracker.close()
    assert curve_of(there(), "loss") == [(10, 0.5), (20, 0.25), (30, 0.25), (40, 0.125)]
    assert len(there()) == 3
    assert not tracker._folder.exists()
    resumed = track("tensorboard", TrackedRun(root, "a run", CONFIG, step=20))
    resumed.close()
    assert curve_of(there(), "loss") == [(10, 0.5), (20, 0.25)]


class FakeWandb(ModuleType):
    """Keeps what is told; a run that goes on begins after the last step of the one before."""

    Image = staticmethod(lambda pixels: ("image", pixels.shape))

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.rows = [], []
        self.errors = SimpleNamespace(Error=KeyError)
        self.Settings = lambda **values: values

    def init(self, **options):
        if options["project"] == "refused":
            raise KeyError("no key.")
        self.runs.append(options)
        step = max((step for step, _ in self.rows), default=-1) + 1
        log = lambda values, step: self.rows.append((step, values))  # noqa: E731
        return SimpleNamespace(starting_step=step, log=log, finish=lambda: self.runs.append("end"))


def test_wandb_goes_on_with_the_same_run_and_is_not_told_twice(tmp_path, monkeypatch):
    service = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", service)
    tracker = track("wandb", TrackedRun(str(tmp_path), "a run", CONFIG))
    for step in (10, 20, 30):
        tracker.scalars(step, {"loss": 1 / step})
    again = track("wandb", TrackedRun(str(tmp_path), "a run", CONFIG, step=20))
    for step in (30, 40):
        again.scalars(step, {"loss": 1 / step})
        again.picture(step, "sheet", PICTURE)
    again.close()
    assert [(step, *values) for step, values in service.rows] == [
        *((step, "loss") for step in (10, 20, 30, 40)),
        (40, "sheet"),
    ]
    assert service.runs[0]["id"] == service.runs[1]["id"]
    assert service.runs[0]["config"] == CONFIG
    assert service.runs[2] == "end"
    track("wandb", TrackedRun(str(tmp_path), "begun anew", CONFIG))
    assert service.runs[3]["id"] != service.runs[0]["id"]
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    with pytest.raises(UserError, match=r"no key.*WANDB_API_KEY"):
        track("wandb", TrackedRun(str(tmp_path), "a run", CONFIG))


class FakeMlflow(ModuleType):
    """One server with one run; `lost` makes it fail."""

    def __init__(self):
        super().__init__("mlflow")
        self.exceptions = SimpleNamespace(MlflowException=ConnectionError)
        self.lost, self.rows, self.params, self.status = False, [], {}, None

    def MlflowClient(self, tracking_uri):
        self.uri = tracking_uri
        return self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, artifacts):
        return name

    def create_run(self, within, run_name):
        return SimpleNamespace(info=SimpleNamespace(run_id="7"))

    def get_run(self, name):
        steps = {"step": float(max(step for step, _ in self.rows))} if self.rows else {}
        return SimpleNamespace(data=SimpleNamespace(metrics=steps))

    def log_batch(self, name, metrics=(), params=()):
        if self.lost:
            raise ConnectionError("gone")
        self.params |= dict(params)
        self.rows += [(step, key) for key, _, _, step in metrics]

    def log_image(self, name, pixels, file, key, step):
        self.rows.append((step, key))

    def set_terminated(self, name):
        self.status = "FINISHED"

    def update_run(self, name, status):
        self.status = status


def test_mlflow_goes_on_with_the_same_run_and_may_be_lost(tmp_path, monkeypatch, capsys):
    service = FakeMlflow()
    entities = SimpleNamespace(Metric=lambda *parts: parts, Param=lambda *parts: parts)
    monkeypatch.setitem(sys.modules, "mlflow", service)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = track("mlflow", TrackedRun(str(tmp_path), "a run", CONFIG))
    assert service.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert service.params == {"model": '"ldm"', "ldm.layers": "2"}
    for step in (10, 20, 30):
        tracker.scalars(step, {"loss": 1 / step})
    again = track("mlflow", TrackedRun(str(tmp_path), "a run", CONFIG, step=20))
    for step in (30, 40):
        again.scalars(step, {"loss": 1 / step})
        again.picture(step, "sheet", PICTURE)
    told = [row for row in service.rows if row[1] != "step"]
    assert told == [*((step, "loss") for step in (10, 20, 30, 40)), (40, "sheet")]
    service.lost = True
    again.scalars(50, {"loss": 1.0})
    assert "mlflow did not take step 50: gone" in capsys.readouterr().out
    again.close()
    assert service.status == "FINISHED"
    with pytest.raises(UserError, match=r"s3://bucket/run.*MLFLOW_TRACKING_URI"):
        track("mlflow", TrackedRun("s3://bucket/run", "a run", CONFIG))


def test_a_tracker_is_imported_only_where_it_is_chosen(tmp_path, monkeypatch):
    packages = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
    for package in packages.values():
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
        monkeypatch.setitem(sys.modules, f"{package}.record_writer", None)
    silent = track("none", TrackedRun(str(tmp_path), "a run", CONFIG))
    silent.scalars(1, {"loss": 1.0})
    silent.close()
    assert list(tmp_path.iterdir()) == []
    for kind, package in packages.items():
        with pytest.raises(UserError, match=f"track={kind} .*pip install {package}"):
            track(kind, TrackedRun(str(tmp_path), "a run", CONFIG))
    with pytest.raises(UserError, match="track=visdom is not known"):
        track("visdom", TrackedRun(str(tmp_path), "a run", CONFIG))


def test_losses_are_told_apart_by_scale_and_timestep():
    batch = {"scale": torch.tensor([0, 2, 2, 0]), "t": torch.tensor([0, 449, 999, 400])}
    two = [Bins((0, 2)), Bins((0, 2))]  # of two workers
    two[0].add(batch, torch.tensor([1.0, 2.0, 4.0, torch.nan]))
    two[1].add(batch, torch.tensor([3.0, torch.inf, 8.0, 5.0]))
    found = two[0].take(two[0].totals() + two[1].totals())
    assert found == {
        "loss/scale 0": 3.0,
        "loss/scale 2": pytest.approx(14 / 3),
        "loss/t 0-0.1": 2.0,
        "loss/t 0.4-0.5": 3.5,
        "loss/t 0.9-1": 6.0,
    }
    assert two[0].take(two[0].totals()) == {}
    two[0].add({"scale": torch.tensor([5, 2])}, torch.tensor([1.0, 2.0]))
    two[0].add({"sample": torch.tensor([0])}, torch.tensor([7.0]))  # a bag has neither
    assert two[0].take(two[0].totals()) == {"loss/scale 2": 2.0}


def test_the_meter_is_about_the_time_since_the_last_reading():
    now = [100.0]
    speed = Meter(torch.device("cpu"), 2, "fp32", 10**12, clock=lambda: now[0])
    speed.stepped(30)
    speed.waited(2.5)
    now[0] = 110.0
    found = speed.read()
    assert found.pop("memory_gb") == pytest.approx(meter.memory_gb(torch.device("cpu")), rel=0.2)
    assert found == {"samples_per_s": 3.0, "waiting": 0.25, "tflops": 1.5}  # a CPU has no MFU
    speed.stepped(10)
    now[0] = 120.0
    assert speed.read()["samples_per_s"] == 1.0
    whole = speed.whole()
    assert (whole["samples_per_s"], whole["waiting"]) == (2.0, 0.125)


def test_mfu_is_the_share_of_the_peaks_of_all_cards(monkeypatch):
    now, peaks = [0.0], [3e9]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.pop(0))
    peaks.append(2e9)
    speed = Meter(torch.device("cuda"), 4, "bf16", 989 * 10**9, clock=lambda: now[0])
    speed.stepped(8000)
    now[0] = 4.0
    found = speed.read()
    assert (found["tflops"], found["mfu"], found["memory_gb"]) == (494.5, 0.5, 3.0)
    assert speed.whole()["memory_gb"] == 3.0


@pytest.mark.parametrize(
    ("card", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        ("", None),
    ],
)
def test_a_card_is_known_by_whole_words_of_its_name(card, bf16):
    assert meter.peak(card, "bf16") == bf16


class Layers(nn.Module):
    """Two trained layers around a frozen one that torch does not know of."""

    def __init__(self, way):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.norm = nn.BatchNorm1d(8)
        self.way, self.held = way, [nn.Linear(16, 4).requires_grad_(False)]

    def front(self, x):
        return self.first(x).tanh()

    def forward(self, batch):
        with torch.no_grad():
            x = self.held[0](batch["x"])
        if self.way == "by value" and x.sum() > 0:
            x = -x
        again = self.way == "again"
        x = checkpoint(self.front, x, use_reentrant=False) if again else self.front(x)
        return nn.functional.dropout(self.last(self.norm(x))).square().mean(dim=1)


@pytest.mark.parametrize(("way", "extra"), [("plain", 0), ("again", 2 * 4 * 8), ("by value", None)])
def test_flops_of_training_are_counted_on_a_copy(way, extra):
    torch.manual_seed(0)
    network = Layers(way)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batch = {"sample": torch.arange(3), "x": torch.randn(3, 16)}
    random = torch.get_rng_state()
    found = memory.training_flops(network, batch)
    # Frozen: forward. First: forward and its weights' gradient. Last: its input's, too.
    by_hand = 2 * (16 * 4) + 2 * 2 * (4 * 8) + 3 * 2 * (8 * 2)
    assert found == (None if extra is None else by_hand + extra)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in network.parameters())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_the_expected_end_is_printed_once_after_a_few_steps(capsys):
    status = {"loss": 0.5, "fraction": 0.01, "rate": 8.0}
    with progress.progress("ldm", 16) as show:
        for step in range(101, 112):  # a resumed run begins anywhere
            show({**status, "step": step, "eta_s": 3600.0})
    lines = [one for one in capsys.readouterr().out.splitlines() if "expected end" in one]
    assert len(lines) == 1
    assert (
        "ldm: 2 s per step of 16 samples on this machine; expected end in 1:00:00, at" in lines[0]
    )
    with progress.progress("ldm", 16) as show:
        show({**status, "step": 1, "eta_s": None})
    assert "expected end" not in capsys.readouterr().out
