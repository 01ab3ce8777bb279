"""What a training leaves for the eye: sheets of samples, the loss curve, and the report."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from raylarge import images
from raylarge.diffusion.schedule import Schedule
from raylarge.models import bundle as bundles
from raylarge.models.summarizer import Summarizer
from raylarge.train.monitor import curve, sample_grid
from raylarge.train.monitor.sample_grid import Painter, cdm_sheet, ldm_sheet, spread
from raylarge.train.tasks.ldm import condition

SCALES = (0, 0, 0, 2, 2, 2, 2, 3)
CELL, GAP, TOP = 128, 4, 22  # of a sheet


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return bundles.load(tiny_bundle)


@pytest.fixture
def batch():
    """Held-out samples of `SCALES`, their indices in no order."""
    source = torch.Generator().manual_seed(0)
    sides = torch.tensor([min(1 << k, 8) for k in SCALES])
    grid = torch.randn(len(SCALES), 64, 8, generator=source)
    return {
        "sample": torch.tensor([5, 90, 12, 7, 3, 80, 41, 2]),
        "scale": torch.tensor(SCALES),
        "latent": torch.randn(len(SCALES), 3, 16, 16, generator=source),
        "grid": grid * (torch.arange(64) < (sides**2)[:, None])[..., None],
        "grid_rows": sides,
        "grid_columns": sides,
    }


class Oracle(nn.Module):
    """A U-Net that knows x_0: the first numbers of its context's first token."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x_t, t, context):
        self.seen.append((len(x_t), t))
        return context[:, 0, : x_t.shape[1], None, None].expand_as(x_t) + self.weight


def cell(sheet, row, column):
    """A cell of a sheet whose rows bear the label `scale k`."""
    left = sheet.shape[1] - (sheet.shape[1] - 40) // (CELL + GAP) * (CELL + GAP)
    top = sheet.shape[0] % (CELL + GAP)
    at = (top + row * (CELL + GAP), left + column * (CELL + GAP))
    return sheet[at[0] : at[0] + CELL, at[1] : at[1] + CELL]


def test_samples_are_spread_over_scales_and_indices(batch):
    some = spread(batch, 2)
    assert some["scale"].tolist() == [0, 0, 2, 2, 3]
    assert some["sample"].tolist() == [5, 12, 3, 41, 2]
    order = torch.randperm(len(SCALES), generator=torch.Generator().manual_seed(1))
    shuffled = spread({name: value[order] for name, value in batch.items()}, 2)
    assert shuffled.keys() == batch.keys()
    for name, value in some.items():
        torch.testing.assert_close(shuffled[name], value, rtol=0, atol=0)


def test_a_sheet_shows_each_sample_beside_one_of_its_condition(bundle, batch):
    oracle, schedule = Oracle(), Schedule(prediction="sample")
    painter = Painter(oracle, schedule, bundle.vae)
    tokens = torch.rand(len(SCALES), 2, 4, generator=torch.Generator().manual_seed(2)) - 0.5
    sheet = ldm_sheet(painter, lambda batch: tokens, batch, seed=3)
    assert sheet.shape == (TOP + 3 * (CELL + GAP), sheet.shape[1], 3)
    assert sheet.shape[1] // (CELL + GAP) == 8  # four of scale 2
    decoded = images.to_uint8(bundle.vae.decode(batch["latent"]).detach())
    for index, (row, place) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        reference = decoded[index].repeat(2, axis=0).repeat(2, axis=1)
        np.testing.assert_array_equal(cell(sheet, row, 2 * place), reference)
    assert (cell(sheet, 0, 6) == 255).all()  # scale 0 has three
    # The oracle's answer, guided away from zeros: 2 c - 0.
    wanted = (2 * tokens[:, 0, :3, None, None]).expand(-1, -1, 16, 16)
    drawn = images.to_uint8(bundle.vae.decode(wanted).detach())[3].repeat(2, axis=0).repeat(2, 1)
    assert np.abs(cell(sheet, 1, 1).astype(int) - drawn).mean() < 3
    assert np.abs(cell(sheet, 1, 3).astype(int) - drawn).mean() > 6  # another condition
    assert {t for _, t in oracle.seen} == {step.t for step in schedule.steps(20)}
    assert max(count for count, _ in oracle.seen) <= 2 * sample_grid.AT_ONCE


def test_guidance_goes_away_from_the_tokens_of_no_condition():
    tokens, null = torch.full((1, 2, 4), 0.5), torch.full((1, 2, 4), 0.25)
    painter = Painter(Oracle(), Schedule(prediction="sample"), null=null, guidance=3.0, steps=50)
    latents = painter.sample(tokens.repeat(20, 1, 1), torch.zeros(20, 3, 8, 8))
    assert latents.shape == (20, 3, 8, 8)
    torch.testing.assert_close(latents, torch.full_like(latents, 1.0), rtol=0, atol=0.05)


def test_without_an_autoencoder_latents_are_shown_as_colours(batch):
    torch.manual_seed(0)
    summarizer = Summarizer(8, 16, 1, 2, 4)
    painter = Painter(Oracle(), Schedule(prediction="sample"))
    one = spread(batch, 1)
    one["latent"] = torch.linspace(-2, 2, 256).reshape(1, 1, 16, 16).repeat(3, 2, 1, 1)
    sheet = ldm_sheet(painter, partial(condition, summarizer), one, seed=0)
    ramp = cell(sheet, 0, 0)
    assert (ramp[0, 0].tolist(), ramp[-1, -1].tolist()) == ([0, 0, 0], [255, 255, 255])
    assert (ramp[..., 0] == ramp[..., 2]).all()  # two channels: grey
    held_against = torch.tensor([-1.0, 3.0]).repeat(32).view(1, 1, 8, 8)
    [grey] = painter.show(torch.ones(1, 1, 8, 8), held_against)
    assert np.unique(grey).tolist() == [128]  # in its middle


def test_a_sheet_is_a_function_of_seed_and_weights(bundle, batch):
    torch.manual_seed(0)
    painter = Painter(bundle.unet, bundle.schedule, bundle.vae, bundle.summarizer.null(1), steps=4)
    some, random = spread(batch, 1), torch.get_rng_state()
    first = ldm_sheet(painter, partial(condition, bundle.summarizer), some, seed=0)
    assert torch.equal(torch.get_rng_state(), random)
    np.testing.assert_array_equal(
        ldm_sheet(painter, partial(condition, bundle.summarizer), some, seed=0), first
    )
    other = ldm_sheet(painter, partial(condition, bundle.summarizer), some, seed=1)
    np.testing.assert_array_equal(cell(other, 0, 0), cell(first, 0, 0))
    assert (cell(other, 0, 1) != cell(first, 0, 1)).any()
    fewer = {name: value[1:] for name, value in some.items()}  # noise stands at (scale, place)
    alone = ldm_sheet(painter, partial(condition, bundle.summarizer), fewer, seed=0)
    assert np.abs(cell(alone, 0, 1).astype(int) - cell(first, 1, 1)).max() <= 1
    assert all(p.grad is None for p in bundle.unet.parameters())


def test_a_sheet_of_the_cdm_has_a_row_of_draws_for_each_scale(bundle):
    painter = Painter(bundle.unet, bundle.schedule, bundle.vae, steps=2)
    sheet = cdm_sheet(painter, bundle.cdm, (1, 3), seed=0)
    assert sheet.shape == (GAP + 2 * (CELL + GAP), sheet.shape[1], 3)
    cells = {cell(sheet, row, column).tobytes() for row in (0, 1) for column in range(4)}
    assert len(cells) == 8
    np.testing.assert_array_equal(cdm_sheet(painter, bundle.cdm, (1, 3), seed=0), sheet)
    tokens = bundle.cdm.draw(3, 0, [(3, 0, 1)])
    made = painter.sample(tokens, sample_grid._noise((3, 16, 16), 0, (3, 3))[1:])
    wanted = painter.show(made)[0].repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(cell(sheet, 1, 1).astype(int) - wanted).max() <= 1


def rows(count, **more):
    return [
        {"step": 10 * i, "loss": 1 / i, "lr": 1e-4, "skipped": 0}
        | {name: value(i) for name, value in more.items()}
        for i in range(1, count + 1)
    ]


def pixels_of(picture, colour):
    return int((np.abs(picture.astype(int) - colour).max(axis=-1) < 12).sum())


def test_the_curve_shows_losses_held_out_losses_and_skipped_steps(tmp_path):
    path = str(tmp_path / "curve.png")
    bare = curve.curve(rows(50), path)
    written, fields = images.read_png(path)
    np.testing.assert_array_equal(written, bare)
    assert "Synthetic" not in fields
    full = curve.drawn(rows(50, val=lambda i: "" if i % 10 else 2 / i, skipped=lambda i: i // 20))
    orange, red, blue = (213, 94, 0), (204, 0, 0), (31, 95, 159)
    assert (pixels_of(bare, orange), pixels_of(bare, red)) == (0, 0)
    assert pixels_of(full, orange) > 100
    assert pixels_of(full, red) > 10
    assert pixels_of(bare, blue) > 500
    bad = curve.drawn(rows(50, loss=lambda i: "nan" if i > 25 else 1 / i))
    assert pixels_of(bad, blue) < pixels_of(bare, blue)
    one = curve.drawn(rows(1))
    assert (one.shape, pixels_of(one, blue) > 20) == (bare.shape, True)
    assert pixels_of(curve.drawn([]), (255, 255, 255)) > 0.98 * bare[..., 0].size


def test_the_report_has_the_same_names_for_every_run(tmp_path):
    facts = {"step": 20, "seconds": 2.5, "loss": float("nan"), "mfu": 0.4, "extra": (1, 2)}
    some = curve.rows_of("step,loss,lr,val\n10,1,1e-4,0.5\n20,0.5,1e-4,nan\n30,0.5,1e-4,0.25\n")
    full = curve.report(str(tmp_path), facts, some)
    assert json.loads((tmp_path / "report.json").read_text()) == full
    assert (full["step"], full["seconds"], full["mfu"], full["loss"]) == (20, 2.5, 0.4, None)
    assert full["best"] == {"step": 30, "val": 0.25}
    assert full["facts"]["extra"] == [1, 2]
    assert full["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    empty = curve.report(str(tmp_path), {}, [])
    assert empty.keys() == full.keys()
    assert empty["best"] is None
