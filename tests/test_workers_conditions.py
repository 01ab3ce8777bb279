"""A text or a label to a large image: the prior's grid reaches every window at its place."""

import dataclasses

import numpy as np
import pytest
import torch

from jobs import sample as job
from raylarge import images
from raylarge import order as orders
from raylarge.errors import UserError
from raylarge.models import bundle as bundles
from raylarge.models.prior import GridPrior
from raylarge.order import Condition
from raylarge.sampling import joint
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.sampling.plan import run
from raylarge.sampling.tasks import EncodeContext, InvertImage, SamplePrior
from raylarge.workers.worker import Worker

CONDITION = ("kind", "fine", "data", "shape", "prior_steps", "prior_guidance", "iterations")
LABEL, OTHER = np.eye(5, dtype=np.float32)[:2]
QUICK = {"steps": 1, "derivative": "difference"}


def with_prior(tiny_bundle, folder, width):
    """The tiny bundle with a grid prior whose every weight matters."""
    import shutil

    shutil.copytree(tiny_bundle, folder)
    torch.manual_seed(1)
    prior = GridPrior(channels=8, vector=width, width=16, blocks=1)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    bundles.save(str(folder), {"prior": prior}, {})
    return str(folder)


@pytest.fixture(scope="module")
def imagining(tiny_bundle, tmp_path_factory):
    return with_prior(tiny_bundle, tmp_path_factory.mktemp("prior") / "b", 5)


def an_order(condition, **values):
    document = condition.plain()
    return orders.parse({"batch": 4, "sampler": QUICK, "condition": document, "seed": 3, **values})


def carried_out(folder, order):
    """The image, the imagined grid and every draw's reply by (scale, row, column)."""
    worker, drawn, kept = Worker(bundles.load(folder)), {}, {}

    def answer(task, **inputs):
        reply = worker.answer(task, **inputs)
        if isinstance(task, SamplePrior | InvertImage):
            kept["grid"] = reply
        if isinstance(task, EncodeContext):
            drawn.update({(task.scale, *w): r for w, r in zip(task.windows, reply, strict=True)})
        return reply

    made = run(joint.plan(order, worker.bundle.patch), answer)
    return made.image, kept.get("grid"), drawn, worker


def test_a_label_becomes_a_large_image_under_one_guide(imagining):
    order = an_order(Condition.of_vector(LABEL), size="128x192")
    image, grid, drawn, worker = carried_out(imagining, order)
    assert image.shape == (128, 192, 3)
    assert grid.shape == (8, 2, 3)
    summarizer = worker.bundle.summarizer
    for r in range(2):
        for c in range(3):
            alone = summarizer(grid[:, r : r + 1, c : c + 1][None], torch.tensor([0]))[0]
            assert torch.allclose(drawn[0, r, c], alone, atol=1e-5)
    square = torch.nn.functional.pad(grid[None], (0, 1, 0, 2), mode="replicate")
    assert torch.allclose(drawn[2, 0, 0], summarizer(square, torch.tensor([2]))[0], atol=1e-5)


@pytest.mark.parametrize("size", ["256x256", "192x256"])
def test_fine_windows_may_follow_the_inverted_guide(imagining, size):
    """Its cells lie over the guide's square, so each window finds its own, also where it is cut."""
    condition = Condition(kind="cdm", fine="inversion", iterations=2)
    order = an_order(condition, size=size)
    image, grid, drawn, worker = carried_out(imagining, order)
    assert image.shape == (*order.size, 3)
    assert grid.shape == (8, 4, 4)  # a cell for each window of the guide's square
    assert (grid[:, 0, 0] - grid[:, 2, 3]).abs().max() > 0.1
    for r in range(order.size[0] // 64):
        for c in range(4):
            cell = grid[:, r : r + 1, c : c + 1][None]
            alone = worker.bundle.summarizer(cell, torch.tensor([0]))[0]
            assert torch.allclose(drawn[0, r, c], alone, atol=1e-5)


def test_windows_under_a_cascade_share_the_inverted_guides_cells(tiny_bundle, tmp_path):
    """A guide at scale 3 with 8 x 8 cells; its windows at scale 1 take 2 x 2 of them."""
    condition = Condition(kind="cdm", fine="inversion", iterations=1)
    order = an_order(condition, size=512, levels="3,1,0", batch=8)
    _, grid, drawn, worker = carried_out(tiny_bundle, order)
    cells = grid[:, 2:4, 4:6][None]
    alone = worker.bundle.summarizer(cells, torch.tensor([1]))[0]
    assert torch.allclose(drawn[1, 1, 2], alone, atol=1e-5)


def test_the_four_conditions_of_fine_windows_share_one_guide(imagining):
    """Under a guide that the CDM drew; a prior draws with a vector or without."""
    seen = {}
    for fine, vector in [("null", ()), ("independent", ()), ("prior", ()), ("prior", LABEL)]:
        drawn_from = Condition.of_vector(LABEL) if len(vector) else Condition()
        condition = drawn_from.replace(kind="cdm", fine=fine)
        order = an_order(condition, size=128)
        facts = BundleFacts.read(imagining)
        facts.check(order)
        worker = Worker(bundles.load(imagining))
        seen[fine, len(vector)] = run(joint.plan(order, facts.patch), worker.answer)
    images_, guides = zip(*((made.image, made.frames) for made in seen.values()), strict=True)
    assert all(torch.equal(guides[0], guide) for guide in guides[1:])
    assert len({image.tobytes() for image in images_}) == 4


def test_vectors_negatives_and_seeds_change_the_grid(imagining):
    def grid(seed=3, **condition):
        made = Condition.of_vector(LABEL).replace(**condition)
        return carried_out(imagining, an_order(made, size=128, seed=seed))[1]

    plain = grid()
    assert torch.equal(plain, grid())
    against = Condition.of_vector(LABEL, OTHER).negative
    others = [
        grid(seed=4),
        grid(data=Condition.of_vector(OTHER).data),
        grid(prior_guidance=3.0),
        grid(prior_guidance=3.0, negative=against),
        grid(prior_steps=10),
    ]
    assert all((plain - other).abs().max() > 1e-3 for other in others)
    assert (others[2] - others[3]).abs().max() > 1e-3


def test_strided_sampling_interpolates_the_imagined_grid(imagining):
    order = an_order(Condition.of_vector(LABEL), size="128x160", algorithm="strided")
    image, grid, drawn, _ = carried_out(imagining, order)
    assert image.shape == (128, 160, 3)
    assert grid.shape == (8, 2, 3)
    assert torch.allclose(drawn[0, 0, 0], grid[:, 0, 0], atol=1e-6)
    assert torch.allclose(drawn[0, 16, 16], grid[:, 1, 1], atol=1e-6)


def test_a_text_becomes_a_picture(tiny_bundle, tmp_path, capsys):
    folder = with_prior(tiny_bundle, tmp_path / "b", 384)
    words = [f"bundle={folder}", "order.size=128", "order.sampler.steps=1", "order.batch=4"]
    words += ["order.sampler.derivative=difference", "order.condition.prior_guidance=2"]
    pictures = []
    for number, text in enumerate(("tumour nests in stroma", "adipose tissue")):
        job.main([*words, f"text={text}", "negative=blur", f"out={tmp_path / str(number)}"])
        picture, marks = images.read_png(str(tmp_path / str(number) / "image.png"))
        assert marks["Origin"] == "novel"
        pictures.append(picture)
    assert (pictures[0] != pictures[1]).any()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"size": 128, "scale": 1}, "for one large image at order.scale 0"),
        ({"count": 2}, "for one large image"),
        ({"size": 128, "prior_steps": 0}, "prior_steps=0: it must be from 1"),
        ({"size": 128, "prior_steps": 1000}, "prior_steps=1000: it must be from 1 to 999"),
        ({"size": 128, "prior_guidance": float("nan")}, "prior_guidance=nan"),
        (
            {
                "size": 128,
                "kind": "cdm",
                "fine": "prior",
                "shape": (),
                "data": "",
                "prior_steps": 0,
            },
            "prior_steps=0",
        ),
        ({"size": 128, "shape": (1, 5)}, "takes one vector"),
        ({"size": 128, "iterations": 0}, "iterations=0: it must be from 1 to"),
    ],
)
def test_bad_prior_orders_are_refused(imagining, values, told):
    of = {k: values.pop(k) for k in CONDITION if k in values}

    def plan():
        order = an_order(Condition.of_vector(LABEL).replace(**of), **values)
        joint.plan(order, bundles.patch_of(imagining))

    with pytest.raises(UserError, match=told):
        plan()


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        (Condition.of_vector(np.ones(7)), r"the vector has the shape \(7,\), the bundle takes 5"),
        (
            Condition.of_vector(np.ones(7)).replace(kind="cdm", fine="prior"),
            "fine prior: the vector",
        ),
        (Condition.of(np.ones((2, 2, 3))), "have 3 channels, the bundle's Summarizer takes 8"),
    ],
)
def test_conditions_that_a_bundle_cannot_read_are_refused_before_any_work(
    imagining, condition, told
):
    facts = BundleFacts.read(imagining)
    assert facts == BundleFacts.of(bundles.load(imagining))
    with pytest.raises(UserError, match=told):
        facts.check(an_order(condition, size=128))


def test_what_a_bundle_lacks_is_refused_with_a_cure(tiny_bundle):
    facts = dataclasses.replace(BundleFacts.read(tiny_bundle), cdm=False)
    with pytest.raises(UserError, match="the bundle has no CDM; train one"):
        facts.check(an_order(Condition(kind="cdm"), size=128))
    with pytest.raises(UserError, match="the bundle has no grid prior"):
        facts.check(an_order(Condition.of_vector(LABEL), size=128))
    facts = BundleFacts.read(tiny_bundle)
    with pytest.raises(UserError, match="the bundle has no grid prior"):
        facts.check(an_order(Condition(kind="cdm", fine="prior"), size=128))
    facts.check(an_order(Condition(kind="cdm", fine="prior"), count=2))  # nothing is guided
    steered = orders.parse({"size": 128, "algorithm": "superres", "source": {"control": True}})
    with pytest.raises(UserError, match="the bundle has no ControlNet"):
        facts.check(steered)
