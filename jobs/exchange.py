"""Vectors and patches to and from other tools; published data sets into tables.

python jobs/exchange.py export=trident|clam data=DIR out=DIR [cells=kept]
python jobs/exchange.py export=features data=DIR table=features-... out=DIR [scale=1]
python jobs/exchange.py import=trident|clam data=DIR source=DIR encoder=uni [fill=true]
python jobs/exchange.py import=tissue source=DIR/patches out=MASKS
python jobs/exchange.py import=brca|naip|brca-demo|naip-demo source=DIR out=DIR bundle=DIR
"""

from __future__ import annotations

from typing import Any, TypeVar

from raylarge import report, storage
from raylarge.config import parse, show_help, wants_help
from raylarge.data.exchange import h5, h5_embed, h5_features, published
from raylarge.data.exchange.layouts import LAYOUTS
from raylarge.errors import UserError

T = TypeVar("T")
HELP: dict[str, type] = {
    "export=trident or export=clam": h5.Export,
    "export=features": h5_features.Features,
    "import=trident or import=clam": h5_embed.Import,
    "import=tissue": h5.Outlines,
    f"import=one of {', '.join(LAYOUTS)}": published.Published,
}
"""What the words `export=` and `import=` may name, and the keys that go with it."""


def main(arguments: list[str]) -> None:
    """Export or import, as the first of the words says, and print what came of it."""
    if wants_help(arguments):
        show_help(__doc__, HELP, (), ("format",))
    words = dict(word.split("=", 1) for word in arguments if "=" in word)
    way = "import" if "import" in words else "export"
    name = words.get(way, "")
    rest = [word for word in arguments if not word.startswith(f"{way}=")]
    for what, facts in _made(way, name, rest).items():
        told = [[key, value] for key, value in facts.items() if not isinstance(value, dict)]
        report.say(report.table([what, ""], told))


def _made(way: str, name: str, rest: list[str]) -> dict[str, dict[str, Any]]:
    chosen = [f"format={name}", *rest]
    if way == "export" and name == "features":
        return {name: h5_features.run(_config(h5_features.Features, rest, "out"))}
    if way == "export":
        return {name: h5.run(_config(h5.Export, chosen, "out"))}
    if name == "tissue":
        return {name: h5.outlines(_config(h5.Outlines, rest, "out"))}
    if name in h5.FORMATS:
        return {"embed": h5_embed.run(_config(h5_embed.Import, chosen, "data"))}
    if name in LAYOUTS:
        return published.run(_config(published.Published, chosen, "out"))
    known = ", ".join([*h5.FORMATS, "tissue", *LAYOUTS])
    raise UserError(f"import={name}: choose one of {known}.")


def _config(schema: type[T], words: list[str], key: str) -> T:
    """A config, once the folder that a key names is known to be writable."""
    config = parse(schema, words, {})
    storage.require_writable(key, getattr(config, key))
    return config


if __name__ == "__main__":
    report.entry(main)
