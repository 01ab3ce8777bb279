"""A digest of the weights that a user gives as a folder."""

from __future__ import annotations

from pathlib import Path

from raylarge import storage
from raylarge.models import hub

_SMALL_FILES = (".json", ".txt")


def folder_digest(folder: str) -> str:
    """A short name for the weights, words and sizes in a folder in the layout of transformers.

    Empty where no folder is given: then they come with the package or the hub that a card names.

    Raises:
        UserError: there are no weights.
    """
    if not folder:
        return ""
    weights_file = hub.find_weights(folder)
    names = {
        name for name in storage.sizes(str(weights_file.parent)) if name.endswith(_SMALL_FILES)
    }
    files = [weights_file, *(Path(weights_file.parent, name) for name in sorted(names))]
    return storage.digest(*(storage.digest_file(file).encode() for file in files))
