"""Locate weights: a local path, or a repository of huggingface.co.

    hub id or path -> file or folder on this machine

Without a network the error comes at once instead of after the hub's retries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from raylarge.errors import UserError

_NAMES = ("model.safetensors", "pytorch_model.bin")
_TIMEOUT_S = 10


def find_weights(path: str, names: Sequence[str] = _NAMES) -> Path:
    """Return a file of weights: `path` itself, or the first of `names` in the folder.

    Raises:
        UserError: there is none.
    """
    location = Path(path)
    if location.is_dir():
        files = [location / name for name in names if (location / name).is_file()]
        if not files:
            raise UserError(
                f"{path} contains none of {', '.join(names)}; name the file of weights."
            )
        return files[0]
    if not location.is_file():
        raise UserError(f"there are no weights at {path}; check the path.")
    return location


def is_repo_id(path: str) -> bool:
    """Return whether a path could be a repository of the hub, `owner/name`, by the hub's rules."""
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
    cure: str,
    beside: Sequence[str] = (),
    is_complete: Callable[[Path], bool] = Path.is_file,
) -> Path:
    """Return the first of `names` in a repository of the hub, from the cache or downloaded.

    Args:
        hub: repository on huggingface.co.
        names: file names in order of preference.
        cure: sentence that says how to do without the hub, for messages.
        beside: patterns of further files to download into the same folder.
        is_complete: whether a cached file has all those beside it; an interrupted download is
            completed.

    Raises:
        UserError: the hub is unreachable, refuses, or has none of them; ends with `cure`.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        cached = _cached(hub, name, cure)
        if cached and is_complete(cached):
            return cached
    for name in names:
        try:
            # One request, without the retries of hf_hub_download.
            url = huggingface_hub.hf_hub_url(hub, name)
            huggingface_hub.get_hf_file_metadata(url, timeout=_TIMEOUT_S)
            if beside:  # before the weights, so that these imply the rest
                huggingface_hub.snapshot_download(hub, allow_patterns=list(beside))
            return Path(huggingface_hub.hf_hub_download(hub, name))
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's clients raise errors of several libraries
            raise _unreachable(hub, error, cure) from error
    raise UserError(f"{hub} on huggingface.co has none of {', '.join(names)}; {cure}")


def _cached(hub: str, name: str, cure: str) -> Path | None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(hub, name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except Exception as error:  # an invalid name, an unreadable cache
        raise _unreachable(hub, error, cure) from error


def _unreachable(hub: str, error: Exception, cure: str) -> UserError:
    reason = str(error).strip().split("\n")[0] or "no answer"
    return UserError(
        f"{hub} could not be loaded from huggingface.co ({type(error).__name__}: {reason}); {cure}"
    )
