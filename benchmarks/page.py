"""Markdown pages of results: machine, versions, command and tables."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from raylarge import report, storage

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "numpy", "tifffile")


@dataclass
class Section:
    """A table with a heading and notes.

    Attributes:
        short: sentences on what falls short of its aim.
    """

    title: str
    header: Sequence[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    short: list[str] = field(default_factory=list)


def show(section: Section) -> None:
    """Print a section."""
    report.say(f"\n{section.title}")
    report.say(report.table(section.header, section.rows))
    for line in [*section.notes, *section.short]:
        report.say(line)


def write(path: str, title: str, command: str, sections: Sequence[Section]) -> None:
    """Write sections as a page."""
    parts = [f"# {title}, {date.today():%B %Y}", f"{machine()} Command: `{command}`."]
    for section in sections:
        lines = [section.header, ["---"] * len(section.header), *section.rows]
        table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
        parts += [f"## {section.title}", table, *section.notes]
    short = [f"- {line}" for section in sections for line in section.short]
    parts += ["## What falls short", "\n".join(short or ["Nothing that was measured here."])]
    storage.write_bytes(storage.absolute(path), ("\n\n".join(parts) + "\n").encode())
    report.say(f"\nwritten to {os.path.relpath(path)}")


def machine() -> str:
    """Return hardware and versions in two sentences."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = [f"{name} {_version(name)}" for name in PACKAGES]
    python = f"Python {platform.python_version()}"
    cuda = [f"CUDA {torch.version.cuda}"] if torch.cuda.is_available() else []
    return (
        f"{os.cpu_count()} cores of {_processor()}, {memory:.0f} GiB, torch threads: "
        f"{torch.get_num_threads()}. {', '.join([python, *packages, *cuda])}."
    )


def command(module: str) -> str:
    """Return the command line of a module with the arguments of this process."""
    return " ".join(["python -m", module, *sys.argv[1:]])


def place(theme: str, hardware: str) -> str:
    """Return the path of the results of a theme on some hardware."""
    return str(RESULTS / f"{theme}_{hardware}_{date.today():%Y%m}.md")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
