"""The model card of a bundle: README.md with the front matter of the Hugging Face hub.

    facts of a bundle (`bundle.facts`), sizes of its parts -render-> README.md

Missing facts appear as "not recorded". The card contains no paths and no names of slides.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from raylarge import storage
from raylarge.models import bundle_parts as files

NAME = "README.md"
AERIAL_MPP = 1e5
"""Micrometres per pixel from which images count as aerial."""

UNKNOWN = "not recorded"
_PRIVATE = ("data", "out", "logs", "card", "plan", "track", "model", "resize_s", "max_failures")
"""Settings that are local paths, or of no interest to others."""

_PURPOSE = {
    "vae": "autoencoder: images to latents and back",
    "vae_small": "small autoencoder, distilled, for corrections while sampling",
    "unet": "denoiser of latents",
    "summarizer": "embeddings and a scale to the tokens that condition the U-Net",
    "cdm": "draws such tokens for a scale, without a real image",
    "prior": "draws grids of embeddings for a text or another vector",
    "controlnet": "steers the U-Net by a low-resolution image",
}
_TRAININGS = ("vae", "vae_small", "ldm", "cdm", "prior", "controlnet")

_LIMITS = """\
Meant for research: on generative models, on augmentation, on teaching material, on methods \
that need large images. Every image that it makes is synthetic, and raylarge marks the files as \
such; keep the mark.

- Not for diagnosis, treatment or any other decision about a person or a place. The images show \
nothing that exists.
- It was trained on the data below and on no others: other stains, scanners, organs, seasons or \
regions are not covered, and rare findings are rarer still in what it makes.
- It has not been shown to keep no training image. Before images are shared in place of real \
ones, search them for near copies of training data.
- Detail between scales agrees as far as sampling constrains it; look at the cross-scale error \
and the seams that raylarge reports with an image."""


def write(folder: str) -> None:
    """Write README.md into a bundle, complete or not, on a disk or at a URL.

    Raises:
        UserError: no bundle there, or a damaged one.
    """
    index = files.read_index(folder)
    sizes = {name: _size(folder, name) for name in files.PARTS if name in index}
    facts = {**index.get("raylarge", {}), "parts": sizes, "written_by": commit()}
    storage.write_bytes(storage.join(folder, NAME), render(facts).encode())


def render(facts: Mapping[str, Any]) -> str:
    """Return the content of a model card.

    Args:
        facts: of a bundle, with `parts`, which are [class, parameters] by name, and `written_by`,
            the commit or version of raylarge.
    """
    sections = {
        "": _opening(facts),
        "Parts": _parts(facts),
        "Intended use and limits": _LIMITS,
        "Data": _data(facts),
        "Training": _training(facts),
        "Licences": _licences(facts),
        "Use": _USE,
    }
    body = "\n\n".join(f"## {name}\n\n{text}" if name else text for name, text in sections.items())
    return f"---\n{_front(facts)}---\n\n{body}\n"


def commit() -> str:
    """Return the commit of this working tree, with -dirty if it was changed, or the version.

    The version, too, if the package is installed inside another repository.
    """
    root = Path(__file__).resolve().parents[2]
    try:
        released = f"raylarge {version('raylarge')}"
    except PackageNotFoundError:
        released = "raylarge, unknown version"
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return released
    return _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or released


def _git(root: Path, *words: str) -> str:
    """Return git's output; empty if git is missing or fails."""
    try:
        process = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return process.stdout.strip()


def _size(folder: str, name: str) -> list[Any]:
    """Return class and number of parameters of a part, by its config."""
    kind = files.class_name(folder, name)
    with torch.device("meta"):
        network = files.PARTS[name][kind].from_config(files.read_config(folder, name))
    return [kind, sum(p.numel() for p in network.parameters())]


def _is_aerial(facts: Mapping[str, Any]) -> bool | None:
    """Return whether images are aerial; None if the bundle has no resolution."""
    mpp = facts.get("base_mpp")
    return None if mpp is None else mpp >= AERIAL_MPP


def _front(facts: Mapping[str, Any]) -> str:
    subject_tags = {True: ["remote-sensing"], False: ["medical", "histopathology"], None: []}
    tags = ["raylarge", "diffusers", "latent-diffusion", "synthetic-images"]
    return yaml.safe_dump(
        {
            "license": "other",
            "license_name": "see-the-section-licences",
            "library_name": "raylarge",
            "pipeline_tag": "unconditional-image-generation",
            "tags": [*tags, *subject_tags[_is_aerial(facts)]],
        },
        sort_keys=False,
    )


def _opening(facts: Mapping[str, Any]) -> str:
    aerial, mpp = _is_aerial(facts), facts.get("base_mpp")
    subject = {True: "aerial images", False: "histopathology slides", None: "images"}[aerial]
    side = facts.get("patch_px", UNKNOWN)
    finest = UNKNOWN if mpp is None else f"{mpp / 1e6:g} m" if aerial else f"{mpp:g} µm"
    source = facts.get("source")
    origin = f" Imported from {_plain(source)}." if source else ""
    return (
        f"# Synthetic {subject}, large and at several scales\n\n"
        f"A bundle of raylarge: latent diffusion over several scales, after "
        f"[ZoomLDM](https://arxiv.org/abs/2411.16969) and "
        f"[Graikos et al.](https://arxiv.org/abs/2312.07330). Patches of {side} px; a pixel of "
        f"the finest scale: {finest}.{origin}"
    )


def _parts(facts: Mapping[str, Any]) -> str:
    digests = facts.get("digests", {})
    sizes: Mapping[str, Sequence[Any]] = facts.get("parts", {})
    rows = [
        [name, kind, f"{count:,}", digests.get(name, ""), _PURPOSE.get(name, "")]
        for name, (kind, count) in sizes.items()
    ]
    return _table(["part", "class", "parameters", "digest", "what it does"], rows)


def _data(facts: Mapping[str, Any]) -> str:
    trained = _trained(facts)
    digests = [[name, _get(run, "data_digest")] for name, run in trained.items()]
    paragraphs = [_table(["training", "digest of its rows"], digests)] if digests else []
    counts = [[name, *_counts(run)] for name, run in trained.items() if run.get("rows")]
    if counts:
        paragraphs.append(_table(["training", "slides", "rows by scale (0 is the finest)"], counts))
    paragraphs.append(
        "Trained on the split `train`; the weights are those of the last step. The split `val` "
        "was only measured, `test` was not seen."
        if trained
        else f"How the data were split: {UNKNOWN}."
    )
    encoder = facts.get("encoder") or {}
    described = [
        [key, _plain(encoder[key])]
        for key in ("name", "model", "width", "input_px", "pooling", "note", "source", "licence")
        if encoder.get(key) not in (None, "")
    ]
    paragraphs.append(
        "The encoder that embedded the patches:\n\n" + _table(["encoder", ""], described)
        if described
        else f"The encoder that embedded the patches: {UNKNOWN}."
    )
    return "\n\n".join(paragraphs)


def _counts(training: Mapping[str, Any]) -> list[str]:
    rows = ", ".join(f"{k}: {int(n):,}" for k, n in sorted(training["rows"].items()))
    return [str(training.get("slides", UNKNOWN)), rows]


def _training(facts: Mapping[str, Any]) -> str:
    trained = _trained(facts)
    if not trained:
        return "Not trained here." if facts.get("source") else f"{UNKNOWN.capitalize()}."
    rows = [
        [
            name,
            _get(run, "step"),
            _get(run, "samples"),
            f"{run['seconds'] / 3600:.3g}" if "seconds" in run else UNKNOWN,
            _loss(run, "loss"),
            _loss(run, "best_loss"),
            _get(run, "commit", facts.get("written_by", UNKNOWN)),
        ]
        for name, run in trained.items()
    ]
    header = ["training", "steps", "samples", "hours", "loss", "best held-out loss", "raylarge"]
    paragraphs = [_table(header, rows)]
    for name, run in trained.items():
        if settings := _settings(run.get("config", {})):
            paragraphs.append(f"Settings of `{name}`:\n\n```yaml\n{settings}```")
    return "\n\n".join(paragraphs)


def _settings(config: Mapping[str, Any]) -> str:
    """Return the settings of a training as YAML, without private ones."""
    public = {name: _file_names(value) for name, value in config.items() if name not in _PRIVATE}
    return yaml.safe_dump(public, sort_keys=False, default_flow_style=None) if public else ""


def _file_names(value: Any) -> Any:
    """Return a setting with paths shortened to file names."""
    if isinstance(value, Mapping):
        return {key: _file_names(inner) for key, inner in value.items()}
    return value.rsplit("/", 1)[-1] if isinstance(value, str) else value


def _licences(facts: Mapping[str, Any]) -> str:
    licence = facts.get("licence")
    terms = dict(licence) if isinstance(licence, Mapping) else {"all": licence} if licence else {}
    encoder = (facts.get("encoder") or {}).get("licence")
    if encoder:
        terms.setdefault("encoder", encoder)
    rows = [[of, _plain(terms.pop(of, UNKNOWN))] for of in ("data", "encoder", "weights")]
    rows += [[of, _plain(value)] for of, value in terms.items()]
    return (
        "raylarge itself is under Apache-2.0. That does not apply to these weights: terms of the "
        "encoder and of the data may bind what was trained with them. Recorded terms:\n\n"
        + _table(["of", "terms"], rows)
    )


_USE = """\
```sh
python jobs/sample.py bundle=DIR order.size=1024 out=image    # in a checkout of raylarge
```

The folder has the layout of diffusers; parts of its classes (`UNet2DConditionModel`, `VQModel`, \
`AutoencoderKL`) and the scheduler load there as they are."""


def _trained(facts: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: facts[name] for name in _TRAININGS if isinstance(facts.get(name), Mapping)}


def _get(facts: Mapping[str, Any], key: str, default: Any = UNKNOWN) -> str:
    value = facts.get(key, default)
    return f"{value:,}" if isinstance(value, int) else _plain(value)


def _loss(facts: Mapping[str, Any], key: str) -> str:
    value = facts.get(key)
    return f"{value:.4g}" if isinstance(value, int | float) else UNKNOWN


def _plain(value: Any) -> str:
    """Return a value as one line of Markdown."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return " ".join(str(value).split()).replace("|", "\\|")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
