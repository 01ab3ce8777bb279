"""What the networks must do whatever their weights are."""

from types import SimpleNamespace

import pytest
import torch

from raylarge.errors import UserError
from raylarge.metrics.consistency import cross_scale_error
from raylarge.metrics.restoration import psnr
from raylarge.metrics.seams import seam_ratio
from raylarge.models import bundle as bundles
from raylarge.models import unet
from raylarge.models.cdm import CDM
from raylarge.models.conditioner import normalise, to_cells
from raylarge.models.denoiser import GaussianDenoiser, Guided, guided
from raylarge.models.embedder import VectorEmbedder
from raylarge.models.light_autoencoder import LightAutoencoder
from raylarge.models.summarizer import Summarizer, _spread
from raylarge.resample import upsample
from raylarge.train.tasks.cdm import CdmConfig, CdmTask


@pytest.fixture
def summarizer():
    torch.manual_seed(0)
    made = Summarizer(channels=6, width=8, layers=1, heads=2, scales=3).eval()
    torch.nn.init.normal_(made.pad_token)
    return made


@pytest.mark.parametrize(("side", "first"), [(1, 32), (2, 30), (4, 24), (8, 0)])
def test_cells_stand_in_the_middle_of_64_slots(summarizer, side, first):
    tokens = torch.arange(64.0)[None, :, None].expand(1, 64, 8)
    placed = summarizer._place(tokens, torch.tensor([side * side]))[0, :, 0]
    assert placed[first : first + side * side].tolist() == list(range(side * side))
    rest = torch.cat([placed[:first], placed[first + side * side :]])
    assert (rest == summarizer.pad_token[0, 0, 0]).all()


def test_a_batch_of_mixed_grids_equals_single_ones(summarizer):
    grids = [torch.randn(1, 6, side, side) for side in (1, 2, 8)]
    cells, size = (torch.cat(parts) for parts in zip(*map(to_cells, grids), strict=True))
    together = summarizer(cells, torch.tensor([0, 1, 2]), size)
    assert together.shape == (3, 65, 8)
    for k in range(3):
        alone = summarizer(grids[k], torch.tensor([k]))
        assert torch.allclose(together[k], alone[0], atol=1e-5)


def test_larger_grids_are_pooled_and_rows_come_first():
    grid = torch.zeros(1, 1, 16, 16)
    grid[:, :, 0, 2:4] = 1
    cells, size = to_cells(grid)
    assert size.tolist() == [[8, 8]]
    assert cells[0, :, 0].nonzero().flatten().tolist() == [1]
    cells, size = to_cells(torch.arange(6.0).reshape(1, 1, 2, 3))
    assert cells[0, :7, 0].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert size.tolist() == [[2, 3]]


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (4, 16), (9, 3), (1, 9), (8, 8)])
def test_a_grid_of_up_to_64_cells_is_taken_as_it_is(summarizer, shape):
    torch.manual_seed(0)
    count, grid = shape[0] * shape[1], torch.randn(1, 6, *shape)
    cells, size = to_cells(grid)
    assert size.tolist() == [list(shape)]
    assert torch.equal(cells[0, :count], grid[0].flatten(1).T)
    assert (cells[0, count:] == 0).all()
    row = grid.reshape(1, 6, 1, count)  # centred row by row: the shape does not matter
    scale = torch.tensor([0])
    assert torch.equal(summarizer(grid, scale), summarizer(row, scale))


@pytest.mark.parametrize(
    ("shape", "wanted"), [((5, 13), (5, 8)), ((9, 8), (8, 8)), ((1, 65), (1, 8))]
)
def test_a_larger_grid_is_averaged_per_axis(shape, wanted):
    cells, size = to_cells(torch.ones(1, 2, *shape))
    assert size.tolist() == [list(wanted)]
    assert (cells[0, :, 0].sum(), cells[0, :, 0].max()) == (wanted[0] * wanted[1], 1)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (3, 21), (21, 3), (2, 3), (7, 9), (8, 8)])
def test_a_grid_of_any_shape_is_laid_out_by_nearest_neighbour(shape):
    rows, columns = shape
    grid = torch.arange(float(rows * columns)).reshape(1, 1, rows, columns)
    spread = _spread(*to_cells(grid))[0, 0]
    wanted = [[grid[0, 0, i * rows // 8, j * columns // 8] for j in range(8)] for i in range(8)]
    assert torch.equal(spread, torch.tensor(wanted))


@pytest.mark.parametrize(("region", "count"), [(0, 1), (3, 2)])
def test_a_cdm_has_as_many_tokens_as_its_conditioner(region, count):
    embedder = VectorEmbedder(8, region, 16, 1)
    task = CdmTask(CdmConfig(16, 1, 2, True), SimpleNamespace(summarizer=embedder), seed=0)
    assert task.network.cdm.draw(0, 1, [(0,)]).shape == embedder.null(1).shape == (1, count, 16)
    zeros, ones = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    batch = {"grid": torch.randn(2, 64, 8), "grid_rows": ones, "grid_columns": ones}
    batch |= {"vector": torch.randn(2, region)} if region else {}
    batch = task.draw(batch | {"scale": zeros, "sample": torch.arange(2)})
    assert task.network(batch).shape == (2,)


def test_a_cdm_refuses_another_number_of_tokens():
    cdm = CDM(channels=4, tokens=5, width=8, depth=1, heads=2, scales=2)
    with pytest.raises(UserError, match="for 5 tokens, but there are 1; train it"):
        cdm(torch.zeros(1, 4, 1), torch.tensor([3]), torch.tensor([0]))


def test_embeddings_are_normalised_per_token():
    cells = normalise(3 * torch.randn(2, 5, 32) + 1)
    assert cells.mean(dim=-1).abs().max() < 1e-5
    assert (cells.std(dim=-1) - 1).abs().max() < 1e-5


def test_the_published_sizes():
    with torch.device("meta"):
        network = unet.build(unet.UNetConfig(), (3, 64, 64), 512)
        summarizer, cdm = Summarizer(), CDM()
    count = {
        "unet": sum(p.numel() for p in network.parameters()),
        "summarizer": sum(p.numel() for p in summarizer.parameters()),
        "cdm": sum(p.numel() for p in cdm.parameters()),
    }
    assert count["unet"] == 400_920_579
    assert count["summarizer"] == 38_656_000
    assert count["cdm"] + cdm.pos_embed.numel() == 130_746_880  # its table counts as published


def test_a_new_cdm_predicts_zero_and_draws_by_address():
    cdm = CDM(channels=4, tokens=5, width=8, depth=1, heads=2, scales=2)
    x = torch.randn(2, 4, 5)
    assert (cdm(x, torch.tensor([3, 4]), torch.tensor([0, 1])) == 0).all()
    torch.nn.init.normal_(cdm.final_layer.linear.weight)
    torch.nn.init.normal_(cdm.final_layer.adaLN_modulation[1].bias)
    pair = cdm.draw(1, 7, [(1, 0, 0), (1, 0, 1)], recipe="paper")
    alone = cdm.draw(1, 7, [(1, 0, 1)], recipe="paper")
    assert torch.allclose(pair[1], alone[0], atol=1e-6)
    assert not torch.allclose(pair[0], pair[1])


def test_a_standardised_cdm_works_in_units_of_each_scale(tmp_path):
    cdm = CDM(channels=4, tokens=5, width=8, depth=1, heads=2, scales=3, standardised=True)
    scale = torch.arange(60) % 2  # none of scale 2
    loud = torch.tensor([0.01, 30.0])[scale][:, None, None]
    raw = torch.randn(60, 4, 5) * loud + 7 * loud
    raw[:, 0, 0] = 3.0  # one value never varies
    cdm.standardise(raw, scale)
    units = cdm.to_standard(raw, scale)
    for k in (0, 1):
        assert units[scale == k].mean(dim=0).abs().max() < 1e-3
        assert units[scale == k, 1:].std(dim=0, correction=0).sub(1).abs().max() < 1e-3
    assert torch.allclose(cdm.to_raw(units, scale), raw, rtol=1e-4)
    cdm.save_pretrained(tmp_path)
    again = CDM.from_pretrained(tmp_path)
    drawn = again.draw(1, 7, [(i,) for i in range(4)])
    assert torch.equal(drawn, cdm.draw(1, 7, [(i,) for i in range(4)]))
    mean = raw[scale == 1].mean(dim=0).T
    assert (drawn - mean).abs().max() < 30.0 < mean[1:, 1:].abs().min()  # a new one says "mean"
    untouched = again.draw(2, 7, [(0,)])
    assert untouched.abs().max() < 1.0


def test_the_autoencoder_standardises_what_it_encodes():
    vae = LightAutoencoder(width=8, blocks=1)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    before = vae(images)
    vae.standardise(images)
    latent = vae.encode(images)
    assert latent.shape == (8, 3, 8, 8)
    assert latent.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (latent.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.allclose(vae(images), before, atol=1e-5)


def test_guidance_is_u_plus_w_times_the_difference():
    class Known:
        schedule = GaussianDenoiser(0.0, 1.0).schedule

        def __call__(self, x_t, t, context):
            return x_t + context.mean(dim=(1, 2))[:, None, None, None]

    x, context = torch.randn(2, 3, 4, 4), torch.ones(2, 5, 6)
    assert torch.allclose(Guided(Known(), 2.5)(x, 1, context), x + 2.5)
    plain = Known()
    assert guided(plain, 1.0) is plain


def test_a_bundle_comes_back_and_names_what_it_lacks(tiny_bundle, tmp_path):
    loaded = bundles.load(tiny_bundle)
    assert (loaded.patch.side_px, loaded.patch.latent, loaded.patch.scales) == (64, (3, 16, 16), 4)
    again = str(tmp_path / "again")
    bundles.save(again, {"vae": loaded.vae}, {"patch_px": 64})
    assert bundles.digest(again, ("vae",)) == bundles.digest(tiny_bundle, ("vae",))
    with pytest.raises(UserError, match=r"lacks unet, summarizer; train it .* model=ldm"):
        bundles.load(again)
    bundles.save(again, {"unet": loaded.unet, "summarizer": loaded.summarizer}, {"note": 1})
    assert bundles.load(again).cdm is None
    facts = bundles.facts(again)
    assert set(facts.pop("digests")) == {"vae", "unet", "scheduler", "summarizer"}
    assert facts == {"patch_px": 64, "note": 1, "format": 2}
    with pytest.raises(UserError, match=r"no bundle at .*nowhere"):
        bundles.load(str(tmp_path / "nowhere"))


def test_metrics_on_images_whose_value_is_known():
    guide = upsample(torch.rand(3, 4, 4) * 2 - 1, 4)  # smooth: nothing that U loses
    mean = guide.mean(dim=(1, 2), keepdim=True)
    assert cross_scale_error(upsample(guide, 4), guide) < 0.05
    assert cross_scale_error(mean.expand(3, 64, 64), guide) == pytest.approx(1.0, abs=1e-4)
    assert cross_scale_error(upsample(guide, 4)[:, :32], guide) < 0.2  # a part of the canvas
    flat = torch.arange(64.0).expand(3, 64, 64) / 64
    assert seam_ratio(flat, 16) == pytest.approx(1.0, abs=1e-4)
    stepped = flat + (torch.arange(64) // 16 % 2) * 0.5
    assert seam_ratio(stepped, 16) > 5
    with pytest.raises(ValueError, match="no borders"):
        seam_ratio(flat, 64)
    assert psnr(torch.zeros(1, 4), torch.full((1, 4), 0.2)) == pytest.approx(20.0, abs=0.01)
