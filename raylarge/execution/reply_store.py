"""The replies of an order on disk, from which the same order resumes.

    FOLDER/.ledger-<order digest>-<bundle digest>/<name of the reply>

A plan's store: each reply is one file, written atomically when the plan is fed it and read when
a request takes it, so few are in memory. The file of a reply that no request needs any more is
emptied; its name stays and says that the request is finished. Another order, or the same one for
another bundle, has another folder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import fsspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raylarge import storage
from raylarge.errors import UserError
from raylarge.order import Order
from raylarge.sampling.plan import Plan, Reply, whole

PREFIX = ".ledger-"
RECENT = 2
"""Replies that stay open: one that many requests take (the guide's frames) is read once."""


@dataclass(frozen=True)
class StoredReply:
    """A reply that is in the store under a name."""

    name: str


class ReplyStore:
    """Keeps the replies of a plan on disk.

    Args:
        root: the folder of its folder; a path or a URL.
        order, bundle: what the replies belong to; the bundle by its digest.
    """

    def __init__(self, root: str, order: Order, bundle: str) -> None:
        self.folder = storage.join(root, f"{PREFIX}{order.digest}-{bundle}")
        self._recent: OrderedDict[str, Reply] = OrderedDict()

    def resume(self, plan: Plan) -> int:
        """Become a plan's store; return how many of its requests are finished."""
        plan.store = self
        sizes = storage.sizes(self.folder)
        full = {name for name in plan.names if sizes.get(_file(name))}
        finished = _usable(plan, {id for id in plan.requests if _file(id) in sizes}, full)
        plan.resume(finished, {name: StoredReply(name) for name in _needed(plan, finished) & full})
        return len(finished)

    def keep(self, name: str, reply: Reply | None) -> StoredReply:
        """Write a reply; None leaves an empty file, which says that it came."""
        storage.write_bytes(self._path(name), _encode(reply))
        if reply is not None:
            self._remember(name, reply)
        return StoredReply(name)

    def open(self, kept: StoredReply) -> Reply:
        """Read a reply.

        Raises:
            UserError: the file is damaged.
        """
        if kept.name not in self._recent:
            self._remember(kept.name, _decode(self._path(kept.name)))
        self._recent.move_to_end(kept.name)
        return self._recent[kept.name]

    def free(self, name: str) -> None:
        """Empty a reply's file; one part of a reply goes altogether."""
        self._recent.pop(name, None)
        if name == whole(name):
            storage.write_bytes(self._path(name), b"")
        else:
            storage.remove(self._path(name))

    def remove(self) -> None:
        """Remove all replies of the order."""
        remove(self.folder)
        self._recent.clear()

    def _path(self, name: str) -> str:
        return storage.join(self.folder, _file(name))

    def _remember(self, name: str, reply: Reply) -> None:
        self._recent[name] = reply
        while len(self._recent) > RECENT:
            self._recent.popitem(last=False)


def remove(folder: str) -> None:
    """Remove the folder of a store, if it exists."""
    fs, root = fsspec.core.url_to_fs(folder)
    if storage.exists(folder):
        fs.rm(root, recursive=True)


def _needed(plan: Plan, finished: Set[str]) -> set[str]:
    """Return names of replies that requests or results still need."""
    open_ = (request for id, request in plan.requests.items() if id not in finished)
    return {
        name
        for name in [*plan.results, *(need for request in open_ for need in request.sources)]
        if whole(name) in finished
    }


def _usable(plan: Plan, complete: Set[str], full: Set[str]) -> frozenset[str]:
    """Return the finished requests without those whose reply is needed but lost."""
    finished = set(complete)
    while lost := {whole(name) for name in _needed(plan, finished) - full}:
        finished -= lost
    return frozenset(finished)


def _file(name: str) -> str:
    return name.replace("/", "-")


def _encode(reply: Reply | None) -> bytes:
    """A tensor or an array as safetensors; no bytes for no reply."""
    if reply is None:
        return b""
    if isinstance(reply, Tensor):
        return save({"tensor": reply.contiguous()})
    return save({"array": torch.from_numpy(reply.copy())})


def _decode(path: str) -> Any:
    try:
        [(kind, tensor)] = load(storage.read_bytes(path)).items()
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged; remove its folder to begin anew.") from error
    return tensor if kind == "tensor" else tensor.numpy()
