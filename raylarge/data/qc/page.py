"""The page that shows all slides of a data folder beside their numbers, as HTML.

It stands alone: no address outside its folder, plain JavaScript to filter and sort, and it opens
from a disk as from a web server. Slides that failed come first. Whatever comes from a table or
an error is escaped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from raylarge.data.pipeline import Facts
from raylarge.data.qc.regions import in_order
from raylarge.errors import printable

_STYLE = """
:root{color-scheme:light dark;--ink:#202124;--soft:#5f6368;--page:#f4f5f7;--card:#fff;
 --line:#d5d8dd;--mark:#0072b2;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a6abb2;--page:#16181c;--card:#212429;
 --line:#3a3f47;--mark:#56b4e9;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:110rem;background:var(--page);color:var(--ink);
 font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0 0 .25rem}h2{font:600 1rem/1.3 ui-monospace,monospace;margin:0}
p{margin:.25rem 0}.soft{color:var(--soft)}a{color:var(--mark)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:.5rem 0}
caption{text-align:left;color:var(--soft)}
th,td{padding:.1rem .9rem .1rem 0;text-align:right;font-weight:400;white-space:nowrap}
thead th{color:var(--soft);border-bottom:1px solid var(--line)}th:first-child{text-align:left}
tr.total>*{border-top:1px solid var(--line);font-weight:600}
@media (min-width:60rem){form{position:sticky;top:0;z-index:1}}
form{display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:end;
 padding:.75rem 0;background:var(--page);border-bottom:1px solid var(--line);margin-bottom:1rem}
label{display:grid;font-size:.8rem;color:var(--soft)}
input,select{font:inherit;font-size:.95rem;color:var(--ink);background:var(--card);height:2.1rem;
 border:1px solid var(--line);border-radius:.35rem;padding:0 .5rem}input[type=number]{width:7rem}
main{display:grid;gap:1rem;align-items:start;
 grid-template-columns:repeat(auto-fill,minmax(min(27rem,100%),1fr))}
article{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem;
 min-width:0;overflow-x:auto;overflow-wrap:anywhere}
article[hidden]{display:none}.failed+:not(.failed){grid-column-start:1}
.failed{border-color:var(--bad)}.failed strong{color:var(--bad)}.note{color:var(--mark)}
article img{display:block;width:100%;aspect-ratio:8/5;object-fit:cover;object-position:top;
 background:#fff;border-radius:.35rem;margin:.5rem 0}
:focus-visible{outline:2px solid var(--mark);outline-offset:2px}
"""

_SCRIPT = """
const at = name => document.getElementById(name), main = document.querySelector("main");
const cards = [...main.children];
const number = (name, otherwise) => at(name).value === "" ? otherwise : Number(at(name).value);
function fits({ dataset: d }) {
  const words = at("words").value.toLowerCase().trim();
  const has = (list, name) => !at(name).value || JSON.parse(list).includes(at(name).value);
  return d.text.includes(words) && has(d.splits, "split") && has(d.tags, "tag")
    && d.kept >= number("kept", 0) && d.mpp >= number("low", 0) && d.mpp <= number("high", 1e9);
}
function show() {
  const [key, sign] = at("order").value.split(" ");
  const late = card => card.className !== "failed";
  cards.sort((a, b) => late(a) - late(b) || sign * (a.dataset[key] - b.dataset[key])
    || (a.id < b.id ? -1 : 1));
  main.append(...cards);
  for (const card of cards) card.hidden = !fits(card);
  at("shown").textContent = cards.filter(card => !card.hidden).length + " of " + cards.length;
}
document.querySelector("form").addEventListener("input", show);
document.querySelector("form").addEventListener("reset", () => setTimeout(show));
show();  // a reloaded page keeps what was typed
"""


_PRIVATE = '<p class="note">This page names the files of the slides: mind who sees it.</p>'


def render(
    facts: Sequence[Facts],
    failed: Sequence[Mapping[str, Any]],
    names: Mapping[str, str] | None = None,
) -> str:
    """The page.

    Args:
        facts: of the parts of TILES (`TileStage` in tile.py), one for each slide.
        failed: `slide_id`, `part` and `reason` of each slide that could not be read.
        names: file names by pseudonym; without them the page names no file.
    """
    names = {key: printable(name) for key, name in (names or {}).items()}
    scales = sorted({int(k) for one in facts for k in one["counts"]})
    cards = [_failed_card(one, names) for one in failed]
    cards += [
        _card(one, scales, names) for one in sorted(facts, key=lambda one: one["slide"]["slide_id"])
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Quality control of {len(facts):,} slides</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<header>{_summary(facts, failed, scales)}{_PRIVATE if names else ''}</header>",
            _controls(in_order({name for one in facts for name in _splits(one)}), len(cards)),
            f"<main>{''.join(cards)}</main>",
            f"<script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def length(um: float) -> str:
    """Micrometres in the unit that people say: of slides 0.5 µm, 12.3 mm; of the ground 0.6 m."""
    for factor, unit in ((1e9, "km"), (1e6, "m"), (1e3, "mm")):
        if um >= factor or (unit == "m" and um >= factor / 10):
            return f"{um / factor:.3g} {unit}"
    return f"{um:.3g} µm"


def _summary(facts: Sequence[Facts], failed: Sequence[Mapping[str, Any]], scales: list[int]) -> str:
    total: Counter[tuple[int, str]] = Counter()
    for one in facts:
        total.update({(int(k), s): n for k, by in one["counts"].items() for s, n in by.items()})
    slides = Counter(name for one in facts for name in _splits(one))
    splits = in_order(slides)
    rows = [(s, [slides[s], *(total[k, s] for k in scales)]) for s in splits]
    sums = [len(facts), *(sum(total[k, s] for s in splits) for k in scales)]
    items = [
        f"{len(facts):,} slides read",
        f"{len(failed):,} failed",
        f"{sum(not _kept(one) for one in facts):,} with nothing kept",
        f"{sum(one['slide']['mpp_override'] is not None for one in facts):,} with µm/px by hand",
        f"{total.total():,} of {sum(one['rows'] for one in facts):,} candidates kept",
    ]
    heads = ["split", "slides", *(f"scale {k}" for k in scales)]
    table = _table("Kept regions by split and scale", heads, [*rows, ("all", sums)])
    return f"<h1>Quality control of the slides</h1><p>{' · '.join(items)}</p>{table}"


def _controls(splits: Sequence[str], count: int) -> str:
    orders = [
        ("id 0", "name"),
        ("kept -1", "most kept"),
        ("kept 1", "fewest kept"),
        ("mpp 1", "finest µm/px"),
        ("mpp -1", "coarsest µm/px"),
        ("area -1", "largest"),
    ]
    tags = [("", "all"), ("failed", "failed"), ("empty", "nothing kept"), ("hand", "µm/px by hand")]
    tags.append(("note", "with a note"))
    numbers = [("kept", "kept, at least", 1), ("low", "µm/px from", "any"), ("high", "to", "any")]
    fields = [
        '<label>Name or label<input id="words" type="search" autocomplete="off"></label>',
        _select("split", "Split", [("", "all"), *((name, name) for name in splits)]),
        _select("tag", "Slides", tags),
        *(
            f'<label>{title}<input id="{name}" type="number" min="0" step="{step}"></label>'
            for name, title, step in numbers
        ),
        _select("order", "Order", orders),
        '<input type="reset" value="Reset">',
        f'<output id="shown" aria-live="polite">{count} of {count}</output>',
    ]
    return f'<form aria-label="Filter and sort" onsubmit="return false">{"".join(fields)}</form>'


def _select(name: str, title: str, options: Iterable[tuple[str, str]]) -> str:
    inner = "".join(f'<option value="{escape(v)}">{escape(text)}</option>' for v, text in options)
    return f'<label>{title}<select id="{name}">{inner}</select></label>'


def _failed_card(one: Mapping[str, Any], names: Mapping[str, str]) -> str:
    name, reason = escape(one["slide_id"]), escape(one["reason"])
    data = {
        "text": f"{one['slide_id']} {names.get(one['slide_id'], '')} {one['reason']}".lower(),
        "splits": [],
        "tags": ["failed"],
        **dict.fromkeys(("kept", "mpp", "area"), 0),
    }
    return (
        f'<article class="failed" id="slide-{name}" {_data(data)}><h2>{name}</h2>'
        f"{_file(one, names)}"
        f'<p><strong>failed</strong> <span class="soft">{escape(one["part"])}</span></p>'
        f"<p>{reason}</p></article>"
    )


def _file(slide: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The line with a slide's file name, where it may be shown."""
    name = names.get(slide["slide_id"])
    return f"<p>{escape(name)}</p>" if name else ""


def _card(one: Facts, scales: Sequence[int], names: Mapping[str, str]) -> str:
    slide, kept = one["slide"], _kept(one)
    by_hand = slide["mpp_override"] is not None
    labels = [f"{key}: {value}" for key, value in slide["labels"].items()]
    notes = slide.get("notes", [])
    rows, columns = slide["size_px"]
    data = {
        "text": " ".join(
            [
                *(slide["slide_id"], names.get(slide["slide_id"], ""), slide["patient_id"]),
                *labels,
                *notes,
            ]
        ).lower(),
        "splits": _splits(one),
        "tags": ["empty"] * (not kept) + ["hand"] * by_hand + ["note"] * bool(notes),
        "kept": kept,
        "mpp": slide["mpp"],
        "area": rows * columns,
    }
    name, file = escape(slide["slide_id"]), quote(f"{slide['slide_id']}.png")
    counts = [(s, [one["counts"].get(str(k), {}).get(s, 0) for k in scales]) for s in _splits(one)]
    alt = f"Slide {name}: bare, its regions by scale, and {'examples' if kept else 'no examples'}"
    items = [
        f"{rows:,} × {columns:,} px",
        f"{length(slide['mpp'])}/px" + by_hand * ' <span class="note">by hand</span>',
        f"{kept:,} of {one['rows']:,} kept",
        f"most tissue in a tile {one['most_tissue']:.0%}",
    ]
    return (
        f'<article id="slide-{name}" {_data(data)}><h2>{name}</h2>{_file(slide, names)}'
        f'<a href="{file}"><img src="{file}" loading="lazy" alt="{alt}"></a>'
        f"<p>{' · '.join(items)}</p>"
        f'<p class="soft">patient {escape(slide["patient_id"])}</p>'
        + (f"<p>{escape(' · '.join(labels))}</p>" if labels else "")
        + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
        + _table("", ["scale", *map(str, scales)], counts)
        + "</article>"
    )


def _table(caption: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Counts with a name before each row; the row named `all` is their sum."""
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body = "".join(
        f'<tr{" class=total" if name == "all" else ""}><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{count:,}</td>" for count in counts)
        + "</tr>"
        for name, counts in rows
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _data(values: Mapping[str, Any]) -> str:
    """What the script filters and sorts by, as attributes; lists as JSON."""
    texts = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }
    return " ".join(f'data-{key}="{escape(text)}"' for key, text in texts.items())


def _kept(one: Facts) -> int:
    return sum(n for by in one["counts"].values() for n in by.values())


def _splits(one: Facts) -> list[str]:
    """The splits of what a slide keeps; of an empty slide, its own."""
    splits = {name for by in one["counts"].values() for name in by}
    return in_order(splits) or [one["slide"]["split"]]
