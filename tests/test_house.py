"""Layering and the house rules that a machine can check."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import grimp

import raylarge

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "raylarge").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])
TREES = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in FILES}
ABOVE = {
    "data",
    "train",
    "serve",
    "evaluate",
    "execution",
    "workers",
    "compute",
}  # these may know Ray

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{name}:{node.lineno} {node.name}", node


def public(body: list[ast.stmt]) -> Iterator[Function]:
    """What others may call: functions of the module and of its public classes."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield from [node] if isinstance(node, Function) else public(node.body)


def lines(node: Function | ast.ClassDef) -> int:
    return node.end_lineno - node.lineno + 1


def test_the_layers_hold():
    # In a process of its own: import-linter switches off loggers that exist already.
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    found = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_root_package_holds_its_version_alone():
    # It belongs to no layer, so an import in it would escape the contracts.
    docstring, version = TREES["raylarge/__init__.py"].body
    assert isinstance(docstring, ast.Expr)
    assert ast.unparse(version.targets[0]) == "__version__"
    assert metadata.version("raylarge") == raylarge.__version__


def test_the_layers_below_the_workers_run_without_ray():
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in TREES
        if name.startswith("raylarge/") and name.split("/")[1] not in ABOVE
    ]
    code = f"""
import importlib, sys
sys.modules.update(ray=None, deepspeed=None)  # importing them now fails
for name in {modules}: importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_deepspeed_is_imported_inside_the_worker():
    for node in TREES["raylarge/train/deepspeed_engine.py"].body:
        for part in ast.walk(node) if not isinstance(node, Function | ast.ClassDef) else ():
            names = [a.name for a in part.names] if isinstance(part, ast.Import) else []
            names += [part.module or ""] if isinstance(part, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "deepspeed" for name in names)


def test_files_are_small_and_named_for_what_they_are():
    counts = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in FILES}
    assert {name: count for name, count in counts.items() if count > 350} == {}
    assert not {file.name for file in FILES} & {"utils.py", "helpers.py", "common.py"}


def test_a_file_opens_with_a_short_docstring():
    docs = {name: ast.get_docstring(tree) for name, tree in TREES.items() if tree.body}
    assert [name for name, doc in docs.items() if not doc or len(doc.splitlines()) > 12] == []


def test_functions_are_small():
    assert [f"{name}: {lines(f)} lines" for name, f in functions() if lines(f) > 40] == []


def test_public_functions_say_what_they_do():
    assert [
        f"{name}:{f.lineno} {f.name}"
        for name, tree in TREES.items()
        if name.startswith("raylarge/")
        for f in public(tree.body)
        if lines(f) > 6 and not ast.get_docstring(f)
    ] == []


def test_no_bare_except():
    handlers = [
        f"{name}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert handlers == []


def test_a_class_name_has_one_owner_and_a_class_is_small():
    classes = [
        (node.name, f"{name}:{node.lineno}", lines(node))
        for name, tree in TREES.items()
        if name.startswith("raylarge/")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    owners = {name: [place for other, place, _ in classes if other == name] for name, *_ in classes}
    assert {name: places for name, places in owners.items() if len(places) > 1} == {}
    assert [place for _, place, count in classes if count > 150] == []


def test_no_modules_import_each_other_in_a_circle():
    # Imports inside functions and for type checking count too.
    graph = grimp.build_graph("raylarge")
    uses = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(uses).prepare()  # raises CycleError
