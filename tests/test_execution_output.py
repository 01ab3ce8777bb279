"""The folder of a sampling job: one result, and nothing of anybody else is lost in silence."""

import json

import numpy as np
import pytest

from raylarge import images, order, storage
from raylarge import pyramid as pyramids
from raylarge.errors import UserError
from raylarge.execution.output import Output

HERE = order.parse({"size": 64, "seed": 1})
OTHER = order.parse({"size": 64, "seed": 2})
PIXELS = np.zeros((64, 64, 3), np.uint8)
EMPTY = {"stages": {}}


def output(folder, of=HERE, bundle="b", compute=""):
    return Output(str(folder), of, bundle, compute)


def write_picture(path, of, bundle="b"):
    marks = {"OrderDigest": of.digest, "Bundle": bundle}
    if path.suffix == ".tif":
        pyramids.write(str(path), [PIXELS], (64, 64), None, marks)
    else:
        images.write_png(str(path), PIXELS, marks)


@pytest.mark.parametrize("name", ["image.png", "guide.png", "image.tif"])
def test_a_picture_belongs_to_the_order_that_it_names(tmp_path, name):
    write_picture(tmp_path / name, HERE)
    assert output(tmp_path).replaced(EMPTY, False) == []
    for other in (output(tmp_path, OTHER), output(tmp_path, bundle="c")):
        with pytest.raises(UserError, match=f"{name}.*another order"):
            other.replaced(EMPTY, False)
        assert other.replaced(EMPTY, True) == [name]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("image.png", images.png_bytes(PIXELS)),
        ("image.png", b"a letter"),
        ("image.png", b""),
        ("guide.png", images.png_bytes(PIXELS)),
        ("image.tif", b"II*\0"),
        ("image.tif", b"a letter"),
        ("order.json", b"{}"),
        ("order.json", b"no JSON"),
        ("order.json", b"[1]"),
    ],
)
def test_files_that_are_not_ours_are_not_replaced_in_silence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        output(tmp_path).replaced(EMPTY, False)
    names = output(tmp_path).replaced(EMPTY, True)
    output(tmp_path).remove(names)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "report",
    [
        {"stages": {"tile": {"seconds": 1}}},
        {"stages": {}, "mine": 1},
        {"stages": {}, "order": OTHER.digest, "bundle": "b", "means": ""},
        {"stages": {}, "order": HERE.digest, "bundle": "c", "means": ""},
        {"stages": {}, "order": HERE.digest, "bundle": "b", "means": "bfloat16"},
    ],
)
def test_a_report_of_another_job_is_not_replaced_in_silence(tmp_path, report):
    storage.write_json(str(tmp_path / "report.json"), report)
    with pytest.raises(UserError, match=r"report\.json"):
        output(tmp_path).replaced(report, False)


@pytest.mark.parametrize(
    "report",
    [
        {"stages": {"start": {"seconds": 1}}},
        {"stages": {}, "order": HERE.digest, "bundle": "b"},
        {"stages": {}, **output("").facts},
    ],
)
def test_the_report_of_an_interrupted_run_is_no_hindrance(tmp_path, report):
    storage.write_json(str(tmp_path / "report.json"), report)
    assert output(tmp_path).replaced(report, False) == []
    assert output(tmp_path).finished(report) == {}


def test_an_unfinished_result_of_another_order_is_not_dropped_in_silence(tmp_path):
    other, here = output(tmp_path, OTHER), output(tmp_path)
    other.ledger.keep("guide", np.zeros(3, np.float32))
    here.ledger.keep("guide", np.zeros(3, np.float32))
    with pytest.raises(UserError, match="holds an unfinished result of another order"):
        here.replaced(EMPTY, False)
    here.remove(here.replaced(EMPTY, True))
    assert [path.name for path in tmp_path.iterdir()] == [here.ledger.folder.rsplit("/", 1)[-1]]


def test_a_refusal_says_in_which_settings_the_orders_differ(tmp_path):
    far = order.parse({"size": 128, "seed": 3, "sampler": {"steps": 7, "eta": 0.5}})
    storage.write_json(str(tmp_path / "order.json"), far.as_json())
    with pytest.raises(UserError) as refused:
        output(tmp_path).replaced(EMPTY, False)
    text = str(refused.value)
    assert "order.sampler.eta=0.5, not 0.0" in text or "order.seed=3, not 1" in text
    assert "and 1 more settings" in text


def test_a_refusal_says_that_precision_or_bundle_differ(tmp_path):
    here = output(tmp_path)
    for facts, says in (
        ({"means": "bfloat16"}, r"\(computed in bfloat16, not float32\)"),
        ({"bundle": "another"}, r"\(of another bundle\)"),
    ):
        report = {"stages": {}, **here.facts, **facts}
        storage.write_json(str(tmp_path / "report.json"), report)
        with pytest.raises(UserError, match=rf"holds report.json .*{says}; choose another"):
            here.replaced(report, False)


def test_a_whole_result_is_recognised(tmp_path):
    here = output(tmp_path)
    write_picture(tmp_path / "image.png", HERE)
    (tmp_path / "order.json").write_text(json.dumps(HERE.as_json()))
    report = {"stages": {}, **here.facts, "files": {"image.png": str(tmp_path / "image.png")}}
    storage.write_json(str(tmp_path / "report.json"), report)
    assert here.replaced(report, False) == []
    assert here.finished(report) == report["files"]
    assert output(tmp_path, OTHER).finished(report) == {}
    (tmp_path / "image.png").unlink()
    assert here.finished(report) == {}


def test_a_folder_of_an_earlier_version_is_recognised(tmp_path):
    """Its digests and keys are those of the settings' earlier names."""
    (tmp_path / ".ledger-fded5f60251ead6f-b").mkdir()
    report = {"stages": {}, "order": "fded5f60251ead6f", "bundle": "b", "means": ""}
    with pytest.raises(UserError, match=r"unfinished result .* earlier version .* overwrite=true"):
        output(tmp_path).replaced(report, False)
    assert ".ledger-fded5f60251ead6f-b" in output(tmp_path).replaced(report, True)


def test_an_order_of_an_earlier_version_is_told_from_another_order(tmp_path):
    document = OTHER.as_json()
    document["sampler"]["inner"] = document["sampler"].pop("corrections")
    storage.write_json(str(tmp_path / "order.json"), document)
    with pytest.raises(UserError, match=r"of another version of raylarge: .*order.sampler.inner"):
        output(tmp_path).replaced(EMPTY, False)
