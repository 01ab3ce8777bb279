"""ARCHITECTURE.md: the walks through the code name modules, classes and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("Life of an order", "Life of a training sample")


def page(title):
    text = (ROOT / "ARCHITECTURE.md").read_text()
    return re.search(rf"^## {title}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]


def defines(body, names):
    """Whether nested definitions of these names stand in a body of statements."""
    if not names:
        return True
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return any(
        isinstance(node, kinds) and node.name == names[0] and defines(node.body, names[1:])
        for node in body
    )


@pytest.mark.parametrize("title", PAGES)
def test_a_walk_is_short_and_true(title):
    text = page(title)
    assert text.count("\n") < 50
    mentions = re.findall(r"`((?:\w+/)*\w+)\.((?!py`)[\w.]+)`", text)
    files = [(path, "") for path in re.findall(r"`((?:\w+/)+\w+)\.py`", text)]
    written_files = {"report.json", "image.png", "image.tif"}
    for path, names in [*mentions, *files]:
        if f"{path}.{names}" in written_files:
            continue
        places = [ROOT / f"{path}.py", ROOT / "raylarge" / f"{path}.py"]
        source = next((place for place in places if place.is_file()), None)
        assert source, path
        body = ast.parse(source.read_text()).body
        assert defines(body, names.split(".") if names else []), f"{path}.{names}"
