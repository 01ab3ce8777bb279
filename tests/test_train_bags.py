import numpy as np
import pytest
from bagged import WIDTH, add, config, row_of, rows, write
from bagged import fold as fold_by

from raylarge import storage
from raylarge.errors import UserError
from raylarge.train import registry
from raylarge.train.labels import bags


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("mil") / "data", slides=48)


def test_folds_share_no_patient_and_hold_out_every_slide_once(data):
    held = []
    for number in range(3):
        fold = fold_by(config(data, fold=number))
        names = np.array(fold.bags.found.patients)
        sides = {split: fold.slides(split) for split in ("train", "val", "test")}
        who = {split: set(names[slides]) for split, slides in sides.items()}
        assert not who["train"] & who["val"]
        assert not who["test"] & (who["train"] | who["val"])
        assert sum(map(len, sides.values())) == 48
        assert {int(name[1:]) // 2 % 6 for name in who["test"]} == {5}
        held += sides["val"].tolist()
    assert sorted(held + sides["test"].tolist()) == list(range(48))


def test_patients_are_dealt_evenly_label_by_label():
    patients = [f"p{i // 2}" for i in range(80)]
    labels = [int(i // 2 >= 33) for i in range(80)]
    dealt = bags.deal(patients, labels, 5, seed=3)
    of = dict(zip(patients, dealt.tolist(), strict=True))
    for group in (range(40), range(33), range(33, 40)):
        counts = np.bincount([of[f"p{i}"] for i in group], minlength=5)
        assert np.ptp(counts) <= 1
    assert (bags.deal(patients[::-1], labels[::-1], 5, seed=3)[::-1] == dealt).all()
    assert (bags.deal(patients, labels, 5, seed=4) != dealt).any()


def test_a_patch_stands_with_the_coarse_patch_that_covers_it(data):
    fold = fold_by(config(data, scales=(0, 2)))
    coarse = [row for row in rows(data) if row["scale"] == 2]
    fine = sorted(
        (row for row in rows(data) if row["scale"] == 0),
        key=lambda row: (row["slide_id"], row["row"], row["column"]),
    )
    found, checked = fold.bags.found, 0
    for i, row in enumerate(fine):
        over = [
            one["feature"]
            for one in coarse
            if one["slide_id"] == row["slide_id"]
            and one["row"] <= row["row"] < one["row"] + 4
            and one["column"] <= row["column"] < one["column"] + 4
        ]
        assert found.features[i, :WIDTH].tolist() == row["feature"]
        assert found.lacking[i].tolist() == [False, not over]
        if over:
            assert found.features[i, WIDTH:].tolist() == over[0]
            checked += 1
    assert len(found.features) == len(fine) > checked > len(fine) / 2


def test_the_nearest_of_several_patches_that_cover_is_taken(tmp_path):
    root = str(tmp_path)
    write(root, patches=(36, 37))
    # A crop of scale 2 at (1, 1) covers (3, 3), and its centre is nearer than that of (0, 0).
    add(root, row_of(0, 2, 1, 1) | {"feature": np.full(WIDTH, 50, np.float16)})
    found = fold_by(config(root, scales=(0, 2))).bags.found
    fine = [row for row in rows(root) if row["scale"] == 0 and row["slide_id"] == "s00"]
    cells = sorted((row["row"], row["column"]) for row in fine)
    of_crop = {cell for cell, x in zip(cells, found.features, strict=False) if x[WIDTH] == 50}
    assert {(3, 3), (4, 4)} <= of_crop
    assert of_crop <= {(r, c) for r in range(1, 5) for c in range(1, 5)} - {(1, 1), (1, 2)}


def test_what_no_coarse_patch_covers_has_the_mean_of_the_slides_that_train(data):
    fold = fold_by(config(data, scales=(0, 2)))
    found, (mean, deviation) = fold.bags.found, fold.statistics
    real = np.concatenate(
        [
            found.features[slice(*found.starts[s : s + 2])][
                ~found.lacking[slice(*found.starts[s : s + 2]), 1]
            ][:, WIDTH:]
            for s in fold.slides("train")
        ]
    ).astype(np.float64)
    np.testing.assert_allclose(mean[WIDTH:], real.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(deviation[WIDTH:], real.std(axis=0), atol=1e-5)
    slide = fold.slides("val")[0]
    gaps = found.lacking[slice(*found.starts[slide : slide + 2]), 1]
    assert 0 < gaps.sum() < len(gaps)
    assert (fold.instances(int(slide))[gaps][:, WIDTH:] == mean[WIDTH:]).all()


def test_features_are_read_once_and_only_where_they_are_used(tmp_path):
    wish = config(write(tmp_path), scales=(0, 2))
    source, found = registry.source(wish.run), fold_by(wish).bags.found
    assert source.facts.channels == found.channels == 2 * WIDTH
    assert "features" not in vars(found)
    source.batch([0])
    assert vars(found)["features"].shape == (len(found), 2 * WIDTH)
    assert fold_by(config(wish.data, scales=(0, 2), fold=1)).bags.found is found


@pytest.mark.parametrize(
    ("feature", "said"), [([np.nan] * WIDTH, "no numbers"), ([1.0], "4 values and others 1")]
)
def test_features_that_are_none_are_refused(tmp_path, feature, said):
    root = write(tmp_path)
    add(root, row_of(0, 0, 9, 9) | {"feature": np.array(feature, np.float16)})
    with pytest.raises(UserError, match=said):
        registry.source(config(root).run).batch([0])


def test_an_epoch_holds_every_slide_once_in_an_order_of_its_own(data):
    source = registry.source(config(data).run)
    slides = fold_by(config(data)).slides("train")
    orders = [[source.slide(len(slides) * e + i) for i in range(len(slides))] for e in range(3)]
    for order in orders:
        assert sorted(order) == slides.tolist()
    assert orders[0] != orders[1] != orders[2]
    assert [source.slide(i) for i in range(len(slides))] == orders[0]


def test_a_large_bag_is_drawn_from_without_replacement(data):
    full, few = registry.source(config(data).run), registry.source(config(data, instances=7).run)
    samples = [sample for sample in range(1000) if few.slide(sample) == few.slide(0)]
    drawn = set()
    for sample in samples:
        own = few.batch([sample])
        assert own["mask"].all()
        assert own["instances"].shape == (1, 7, WIDTH)
        taken = {tuple(row.tolist()) for row in own["instances"][0]}
        assert len(taken) == 7
        drawn |= taken
    whole = full.batch(samples[:1])
    assert whole["mask"].sum() > 7
    assert drawn == {tuple(row.tolist()) for row in whole["instances"][0][whole["mask"][0]]}


def test_slides_without_the_label_are_left_out(tmp_path):
    root = write(tmp_path, says=lambda i: -1 if i == 7 else i % 2)
    fold = fold_by(config(root))
    assert len(fold.bags) == 23
    assert "s07" not in fold.bags.found.slides
    assert fold.bags.facts.classes == ("high", "low")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"label": ""}, r"mil.label=\(empty\).*are: empty, grade"),
        ({"label": "stage"}, "mil.label=stage is no label .*empty, grade"),
        ({"label": "empty"}, "mil.label=empty is no label"),
        ({"fold": 3}, "mil.fold=3 is none of mil.folds=3"),
        ({"folds": 1}, "mil.folds=1; give 2"),
        ({"folds": 30, "fold": 29}, "mil.fold=29 holds no slide out: there are 20 patients"),
        ({"scales": (1,)}, "no patch of scale 1"),
        ({"scales": (2, 0)}, "must be ascending"),
        ({"instances": 0}, "mil.instances=0"),
        ({"memory_gib": 1e-6}, "GiB in each worker"),
        ({"features": "features-1"}, "there are no features-1 yet"),
    ],
)
def test_what_cannot_be_is_refused(data, values, said):
    with pytest.raises(UserError, match=said):
        registry.source(config(data, **values).run)


def test_one_class_is_refused(tmp_path):
    root = write(tmp_path, says=lambda i: 1)
    with pytest.raises(UserError, match="is 'high' for all 24 slides"):
        registry.source(config(root).run)


def test_a_fold_that_leaves_one_class_to_learn_from_is_refused(tmp_path):
    root, said = write(tmp_path, says=lambda i: int(i == 0)), []
    for fold in range(3):
        try:
            registry.source(config(root, fold=fold).run)
        except UserError as error:
            said.append(str(error))
    (only,) = said
    assert "slides of 1 of the classes high, low to learn from" in only


def test_features_must_be_named_where_there_are_several(data, tmp_path):
    with pytest.raises(UserError, match="there are 0 tables of features"):
        registry.source(config(str(tmp_path)).run)
    write(tmp_path)
    storage.write_json(f"{tmp_path}/features-1.json", {})
    with pytest.raises(UserError, match=r"mil\.features=: features-0, features-1"):
        registry.source(config(str(tmp_path)).run)
