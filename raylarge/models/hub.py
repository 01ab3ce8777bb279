"""Where weights come from: a path, or a repository of huggingface.co.

    hub id or path -> file or folder on this machine

A machine without a network is told so at once instead of after the hub's retries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from raylarge.errors import UserError

_NAMES = ("model.safetensors", "pytorch_model.bin")
_PATIENCE_S = 10


def find_weights(path: str, names: Sequence[str] = _NAMES) -> Path:
    """The file of weights at a path: the file itself, or one of `names` in a folder.

    Raises:
        UserError: there is none.
    """
    found = Path(path)
    if found.is_dir():
        inside = [found / name for name in names if (found / name).is_file()]
        if not inside:
            raise UserError(f"{path} holds none of {', '.join(names)}; name the file of weights.")
        return inside[0]
    if not found.is_file():
        raise UserError(f"there are no weights at {path}; check the path.")
    return found


def is_repo_id(path: str) -> bool:
    """Whether a path could be a repository of the hub, `owner/name`, by the hub's own rule."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return "/" in path


def fetch(
    hub: str,
    names: Sequence[str],
    told: str,
    beside: Sequence[str] = (),
    whole: Callable[[Path], bool] = Path.is_file,
) -> Path:
    """The first of `names` that a repository of the hub holds, from the cache or downloaded.

    Args:
        hub: repository on huggingface.co.
        names: file names in order of preference.
        told: the sentence on how to do without the hub.
        beside: patterns of files that are wanted in the same folder.
        whole: whether a file in the cache has all it needs beside it; a download that was
            broken off has not, and is completed.

    Raises:
        UserError: the hub is out of reach, refuses, or holds none of them; ends with `told`.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        cached = _cached(hub, name, told)
        if cached and whole(cached):
            return cached
    for name in names:
        try:
            # Asked once and without the retries that hf_hub_download makes.
            url = huggingface_hub.hf_hub_url(hub, name)
            huggingface_hub.get_hf_file_metadata(url, timeout=_PATIENCE_S)
            if beside:  # before the weights: where those are, the rest is too
                huggingface_hub.snapshot_download(hub, allow_patterns=list(beside))
            return Path(huggingface_hub.hf_hub_download(hub, name))
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's clients raise errors of several libraries
            raise _refusal(hub, error, told) from error
    raise UserError(f"{hub} on huggingface.co holds none of {', '.join(names)}; {told}")


def _cached(hub: str, name: str, told: str) -> Path | None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(hub, name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except Exception as error:  # no name of a repository, a cache that cannot be read
        raise _refusal(hub, error, told) from error


def _refusal(hub: str, error: Exception, told: str) -> UserError:
    why = str(error).strip().split("\n")[0] or "no answer"
    return UserError(
        f"{hub} could not be had from huggingface.co ({type(error).__name__}: {why}); {told}"
    )
