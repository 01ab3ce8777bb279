"""The grid prior learns grids from vectors, each sample by itself, in the units of sampling."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from raylarge import storage
from raylarge.data import text_embed
from raylarge.data.pipeline import ExecutorConfig
from raylarge.data.text_embed import TextEmbedConfig
from raylarge.diffusion.noise import generator
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models import bundle_parts
from raylarge.models.prior import GridSampling
from raylarge.train import registry
from raylarge.train.config import Train
from raylarge.train.task import DataFacts, TrainTask
from raylarge.train.tasks import prior
from raylarge.train.tasks.prior import PriorConfig

CHANNELS, VECTOR = 6, 3
SMALL = PriorConfig(width=32, blocks=1, drop=0.2)
ADDRESSES = [(k,) for k in range(64)]
RELATION = generator(0, "relation").standard_normal((VECTOR, CHANNELS)).astype(np.float32)
SIZE, PLACE = np.float32([1, 2, 4, 4, 2, 1]), np.float32([0, 5, 10, -10, 0, 3])


Config = partial(Train, model="prior", data="", out="", prior=SMALL)


class Rows:
    """Random rows: the mean of a grid is a linear function of its vector, in uneven units."""

    digest = "rows"
    facts = DataFacts(CHANNELS, {2: 1000}, (3, 8, 8), None, None, {"name": "toy"}, vector=VECTOR)

    def batch(self, samples):
        vectors, grids = [], []
        for sample in samples:
            draw = generator(1, "row", sample)
            vector = 3 + 2 * draw.standard_normal(VECTOR, dtype=np.float32)
            cells = mean_of(vector) + 0.3 * SIZE * draw.standard_normal((16, CHANNELS))
            vectors.append(vector)
            grids.append(np.pad(cells, ((0, 48), (0, 0))))
        sides = torch.full((len(samples),), 4)
        return {
            "sample": torch.tensor(list(samples)),
            "scale": torch.full((len(samples),), 2),
            "grid": torch.from_numpy(np.stack(grids).astype(np.float32)),
            "grid_rows": sides,
            "grid_columns": sides,
            "vector": torch.from_numpy(np.stack(vectors)),
        }


def mean_of(vector):
    """Raw means over the cells of a grid."""
    return SIZE * ((vector - 3) / 2 @ RELATION) + PLACE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder that has a table of vectors, by its manifest."""
    root = str(tmp_path_factory.mktemp("data"))
    made = {"parts": [], "config": {"text_embed": {"from": "captions", "model": "minilm"}}}
    storage.write_json(f"{root}/text_embed-abc.json", made)
    return root


@pytest.fixture
def make(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prior, "source", lambda config, run, split="train": Rows())
    return lambda **more: registry.build(
        Config(data=folder, out=str(tmp_path / "bundle"), **more).run, Rows.facts
    )


def fitted(task, rows, steps, batch=64):
    """The losses of some steps."""
    optimizer = torch.optim.Adam(task.network.parameters(), lr=5e-3)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    losses = []
    for step in range(steps):
        samples = range(step * batch, (step + 1) * batch)
        loss = task.network(task.draw(rows.batch(samples))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained(folder):
    threads, patch = torch.get_num_threads(), pytest.MonkeyPatch()
    torch.set_num_threads(1)
    patch.setattr(prior, "source", lambda config, run, split="train": Rows())
    task = registry.build(Config(data=folder, out=f"{folder}/bundle").run, Rows.facts)
    losses = fitted(task, Rows(), 250)
    task.network.eval()
    patch.undo()
    torch.set_num_threads(threads)
    return task, losses


def drawn_means(task, vectors, **how):
    """Standardised means over cells of one draw per address."""
    net = task.network.prior
    grids = net.draw(torch.as_tensor(vectors), 0, ADDRESSES, steps=20, **how)
    return net.to_standard(grids).mean(dim=(2, 3))


def wanted_means(task, vectors):
    raw = torch.from_numpy(mean_of(vectors))
    return task.network.prior.to_standard(raw[..., None, None])[..., 0, 0]


def test_training_lowers_the_loss(trained):
    task, losses = trained
    assert isinstance(task, TrainTask)
    assert task.averaged is task.network.prior
    assert np.mean(losses[-20:]) < 0.5 * losses[0]


def test_draws_follow_the_vector_in_raw_units(trained):
    task, _ = trained
    vectors = Rows().batch(range(10**6, 10**6 + 64))["vector"]
    wanted, found = wanted_means(task, vectors.numpy()), drawn_means(task, vectors)
    left = (found - wanted).square().mean() / wanted.square().mean()
    others = (found - wanted.roll(1, 0)).square().mean() / wanted.square().mean()
    assert left < 0.15
    assert others > 1
    raw = task.network.prior.draw(vectors, 0, ADDRESSES, steps=20)
    assert (raw.mean(dim=(0, 2, 3)) - torch.from_numpy(PLACE)).abs().max() < 3


def test_without_a_vector_draws_are_as_spread_as_the_data(trained):
    task, _ = trained
    found = drawn_means(task, torch.zeros(1, VECTOR))
    wanted = wanted_means(task, Rows().batch(range(500))["vector"].numpy())
    ratio = found.std(dim=0).norm() / wanted.std(dim=0).norm()
    assert 0.6 < ratio < 1.4
    given = drawn_means(task, 3 + 2 * torch.eye(VECTOR)[:1])
    assert given.std(dim=0).norm() < 0.5 * found.std(dim=0).norm()


def test_a_negative_vector_pushes_away(trained):
    task, _ = trained
    one, other = 3 + 2 * torch.eye(VECTOR)[:1], 3 - 2 * torch.eye(VECTOR)[:1]
    axis = wanted_means(task, one.numpy()) - wanted_means(task, other.numpy())

    def along(vectors, **how):
        return (drawn_means(task, vectors, **how) * axis).sum(dim=1).mean() / axis.square().sum()

    plain = along(one)
    assert plain == pytest.approx(0.5, abs=0.15)
    assert along(one, guidance=2.0, negative=other) > plain + 0.3
    assert along(torch.zeros(1, VECTOR), guidance=2.0, negative=one) < -0.2


def test_a_missing_vector_is_a_dropped_one(make):
    task = make()
    torch.nn.init.normal_(task.network.prior.grid_out.weight, std=0.1)
    batch = task.draw(Rows().batch(range(8)))
    dropped = task.network({**batch, "coin": torch.zeros(8)})
    missing = {**batch, "vector": torch.zeros(8, VECTOR), "coin": torch.ones(8)}
    assert torch.equal(task.network(missing), dropped)
    assert not torch.allclose(task.network({**batch, "coin": torch.ones(8)}), dropped)


def test_a_sample_is_by_itself(make):
    task = make()
    torch.nn.init.normal_(task.network.prior.grid_out.weight, std=0.1)
    far = 5 * 2**32 + 7
    both = task.draw(Rows().batch([3, 4]))
    each = [task.draw(Rows().batch([sample])) for sample in (3, 4)]
    for name in ("t", "eps", "coin"):
        assert torch.equal(both[name], torch.cat([one[name] for one in each]))
    losses = task.network(both)
    assert losses.shape == (2,)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses, torch.cat([task.network(one) for one in each]), rtol=1e-5)
    again = make(seed=1)
    assert not torch.equal(again.draw(Rows().batch([3, 4]))["eps"], both["eps"])
    one, other = ({"sample": torch.tensor([s])} for s in (far, 7))
    assert not torch.equal(task.draw(one)["eps"], task.draw(other)["eps"])


def test_the_units_are_known_before_training_and_the_same_for_everybody(make):
    one, other = make(batch=8), make(batch=64)
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name])
    x_0 = one.network.prior.to_standard(prior.grids_of(Rows().batch(range(2000, 2400)), 4))
    assert x_0.mean(dim=(0, 2, 3)).abs().max() < 0.15
    assert (x_0.std(dim=(0, 2, 3)) - 1).abs().max() < 0.15
    loss = one.network(one.draw(Rows().batch(range(64)))).mean().item()
    assert loss == pytest.approx(1.0, abs=0.15)  # a new prior predicts the mean


def test_grids_of_another_size_are_refused(make, monkeypatch):
    whole = Rows().batch

    def halved(_self, samples):
        return {**whole(samples), "grid_rows": torch.full((len(samples),), 2)}

    monkeypatch.setattr(Rows, "batch", halved)
    with pytest.raises(UserError, match=r"prior\.scale=2 have grids of 2x4 embeddings, not 4x4"):
        make()


def test_cells_come_row_by_row():
    cells = torch.arange(64.0)[None, :, None] + torch.tensor([0.0, 0.5])
    grids = prior.grids_of({"grid": cells}, 4)
    assert grids.shape == (1, 2, 4, 4)
    assert grids[0, 0, 1].tolist() == [4, 5, 6, 7]
    assert grids[0, 1, :, 0].tolist() == [0.5, 4.5, 8.5, 12.5]


def test_a_sheet_shows_what_follows_the_vector(trained):
    task, _ = trained
    page = task.sheet(Rows().batch(range(12)))
    assert page.dtype == np.uint8
    assert page.shape[2] == 3
    data, drawn, free = (page[y : y + 64, -8 * 68 :].astype(float) for y in (4, 72, 140))
    assert np.abs(data - drawn).mean() < 0.7 * np.abs(data - free).mean()
    narrow = [torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)]
    assert [one.shape for one in prior.false_colours(narrow)] == [(3, 4, 4, 3)] * 2


def test_the_average_is_what_a_bundle_holds(make, tmp_path):
    task = make()
    averaged = {name: value + 1 for name, value in task.averaged.state_dict().items()}
    task.finish(str(tmp_path / "bundle"), averaged, {"step": 3}, Rows().batch(range(64)))
    found = bundle_parts.load_part(str(tmp_path / "bundle"), "prior")
    assert torch.equal(found.grid_out.bias, torch.ones(CHANNELS))
    assert (found.config.side, found.config.vector) == (4, VECTOR)
    known = bundles.facts(str(tmp_path / "bundle"))["prior"]
    assert known["step"] == 3
    assert known["vectors"] == {"table": "vectors-abc", "from": "captions", "model": "minilm"}


def with_vectors(examples, folder, missing):
    """Examples of scales 0 to 2, and vectors: the mean of a grid, of some zeros or nothing."""
    root = shutil.copytree(examples, folder / "data").as_posix()
    columns = ["key", "scale", "grid", "grid_rows"]
    paths = storage.children(f"{root}/examples", "*.parquet")
    rows = pa.concat_tables(storage.read_table(path, columns) for path in paths).to_pylist()
    own = {"key": [], "mean": []}
    for row in rows:
        known = row["scale"] == 2 and row["key"] % 4
        if known or missing == "refuse":
            mean = np.array(row["grid"], np.float32).reshape(row["grid_rows"] ** 2, -1).mean(axis=0)
            own["mean"].append(mean * bool(known))
            own["key"].append(row["key"])
    own["key"] = pa.array(own["key"], pa.uint64())
    storage.write_table(f"{folder}/own.parquet", pa.table(own))
    wish = TextEmbedConfig(vectors=f"{folder}/own.parquet:mean", missing=missing)
    text_embed.run(root, wish, ExecutorConfig())
    return Config(data=root, out=str(folder / "bundle"), batch=16)


@pytest.fixture
def real(small_examples, tmp_path):
    return with_vectors(small_examples, tmp_path, "refuse")


@pytest.mark.parametrize("missing", ["refuse", "drop"])
def test_vectors_of_a_table_meet_their_grids(small_examples, tmp_path, missing):
    real = with_vectors(small_examples, tmp_path, missing)
    rows = registry.source(real.run)
    batch = rows.batch(range(40))
    assert set(batch["scale"].tolist()) == {2}
    means = prior.grids_of(batch, 4).mean(dim=(2, 3))
    given = batch["vector"].any(dim=1)
    assert given.any()
    assert not given.all()
    assert torch.allclose(batch["vector"][given], means[given], atol=1e-2)
    assert rows.facts.vector == rows.facts.channels == means.shape[1]
    task = registry.build(real.run, rows.facts)
    losses = fitted(task, rows, 40, batch=16)
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    vector = batch["vector"][given][:1]
    raw = task.network.prior.sample(vector, 0, [(0,)], GridSampling(20, shape=(8, 12)))
    assert raw.shape == (1, rows.facts.channels, 8, 12)
    assert task.sheet(batch).shape[2] == 3


def test_what_does_not_fit_is_refused_with_the_cure(real, tmp_path):
    for wrong, told in (
        ({"scale": 4}, r"prior\.scale=4: it must be 0 to 3\."),
        ({"width": 40}, r"prior\.width=40: it must be a multiple of 16"),
        ({"blocks": 0}, r"prior\.blocks=0: it must be 1 or more"),
        ({"drop": 1.5}, r"prior\.drop=1\.5: it must be 0 to 1"),
        ({"vectors": "nothing"}, r"text_embed-nothing\.json is missing"),
        ({"scale": 3}, r"scale 3 has no row of the split 'train'"),
    ):
        with pytest.raises(UserError, match=told):
            registry.source(replace(real, prior=replace(SMALL, **wrong)).run)
    facts = registry.source(real.run).facts
    bundles.save(real.out, {}, {"encoder": {"name": "uni"}})
    with pytest.raises(UserError, match=r"embeddings of uni, the data hold those of toy; prepare"):
        registry.build(real.run, facts)
    name = storage.children(real.data, "text_embed-*.json")[0]
    storage.write_json(f"{real.data}/text_embed-other.json", storage.read_json(name))
    with pytest.raises(UserError, match=r"has 2 tables of vectors; choose one: prior\.vectors="):
        registry.source(real.run)
    with pytest.raises(UserError, match=r"has 0 tables of vectors; make one with .*text_embed"):
        registry.source(replace(real, data=str(tmp_path)).run)
