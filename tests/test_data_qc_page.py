"""The page over all slides of a data folder."""

import json
from html.parser import HTMLParser
from pathlib import Path

import test_data_qc
from test_data_qc import page_of

from raylarge import storage
from raylarge.data.qc import page as qc_page

VOID = {"meta", "img", "input"}
tiled = test_data_qc.tiled  # a fixture


class Page(HTMLParser):
    """Tables, cards and addresses of a page whose tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cards, self.addresses, self.tables, self.alts = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "article":
            self.cards.append(found)
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag == "img":
            self.alts.append(found["alt"])
            assert found["loading"] == "lazy"
        elif tag == "th":
            assert found["scope"] in ("col", "row")
        assert not [name for name in found if name.startswith("on") and name != "onsubmit"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1].append(data)


def test_lengths_are_said_in_the_right_unit():
    said = [qc_page.length(um) for um in (0.2525, 44.8, 1e3, 64_500.0, 6e5, 1e6, 2e9)]
    assert said == ["0.253 µm", "44.8 µm", "1 mm", "64.5 mm", "0.6 m", "1 m", "2 km"]


def test_the_pages_numbers_are_the_tables(tiled):
    found = Page(page_of(tiled))
    rows = [
        row
        for path in storage.glob(f"{tiled}/tiles/*.parquet")
        for row in storage.read_table(path).to_pylist()
    ]
    kept = [row for row in rows if row["kept"]]

    def count(split, scale, of=kept):
        return sum(
            row["split"] in (split, *["train", "val"] * (split == "all")) and row["scale"] == scale
            for row in of
        )

    assert found.tables[0] == [
        ["split", "slides", "scale 0", "scale 1", "scale 2"],
        *(
            [split, "2", *(f"{count(split, k):,}" for k in range(3))]
            for split in ("train", "val", "all")
        ),
    ]
    assert f"{len(kept):,} of {len(rows):,} candidates kept" in page_of(tiled)
    assert len(found.cards) == 2
    for card, inner in zip(found.cards, found.tables[1:], strict=True):
        mine = [row for row in kept if row["slide_id"] == card["id"].removeprefix("slide-")]
        assert int(card["data-kept"]) == len(mine) > 0
        for line in inner[1:]:
            assert line[1:] == [str(count(line[0], k, mine)) for k in range(3)]
    by_hand = [card for card in found.cards if "hand" in json.loads(card["data-tags"])]
    assert len(by_hand) == 1  # the table's mpp


def test_the_page_stands_alone_and_says_no_name(tiled):
    text = page_of(tiled)
    found = Page(text)
    assert all((Path(tiled) / "qc" / address).is_file() for address in found.addresses)
    assert len(found.addresses) == 4
    assert all("Slide" in alt for alt in found.alts)
    for name in ("DOE", "JANE", "ROE", ".tif", "Miller", str(Path(tiled).parent)):
        assert name not in text
    assert "http" not in text


def facts(slide_id, counts, **more):
    slide = {"slide_id": slide_id, "patient_id": "p", "split": "train", "labels": {}, "mpp": 0.5}
    slide |= {"mpp_override": None, "size_px": [10, 20], "grid": [1, 2], **more}
    return {"slide": slide, "counts": counts, "rows": 9, "most_tissue": 0.25}


def test_whatever_users_wrote_is_escaped():
    evil = "</script><img src=x onerror=alert(1)> \"'&"
    counts = {"0": {evil: 3}}
    slides = [facts(evil, counts, labels={evil: evil}, patient_id=evil)]
    failed = [{"slide_id": evil, "part": evil, "reason": evil}]
    text = qc_page.render(slides, failed)
    found = Page(text)
    assert len(found.alts) == 1
    assert json.loads(found.cards[1]["data-splits"]) == [evil]
    assert found.tables[0][1] == [evil, "1", "3"]
    assert all(address.startswith("%3C") for address in found.addresses)


def test_failed_slides_come_first_and_empty_ones_are_named():
    slides = [
        facts("b", {}, split="test"),
        facts("a", {"0": {"val": 2}, "10": {"train": 1}, "9": {"val": 4}}),
    ]
    failed = [{"slide_id": "z", "part": "tiles/z.parquet", "reason": "it is cut short"}]
    text = qc_page.render(slides, failed)
    found = Page(text)
    assert [card["id"] for card in found.cards] == ["slide-z", "slide-a", "slide-b"]
    assert [json.loads(card["data-tags"]) for card in found.cards] == [["failed"], [], ["empty"]]
    assert found.tables[0] == [
        ["split", "slides", "scale 0", "scale 9", "scale 10"],
        ["train", "1", "0", "0", "1"],
        ["val", "1", "2", "4", "0"],
        ["test", "1", "0", "0", "0"],
        ["all", "2", "2", "4", "1"],
    ]
    assert "2 slides read · 1 failed · 1 with nothing kept" in text
    assert "it is cut short" in text
    assert Page(qc_page.render([], [])).cards == []
