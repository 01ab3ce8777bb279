"""The ledger: finished requests of an order, on disk, from which the same order goes on.

    FOLDER/.ledger-<order digest>-<bundle digest>/<request id>

Each reply is one atomic file, written as soon as the plan was fed it. One that no request
needs any more is emptied; its name stays, so that it is known to be finished. Another
order, or the same one for another bundle, has another folder and never meets these replies.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from raylarge import storage
from raylarge.errors import UserError
from raylarge.order import Order
from raylarge.sampling.plan import Plan, Reply, Snapshot


class Ledger:
    """Keeps what a plan has been fed.

    Args:
        root: where the ledger lies; a local folder or a URL.
        order, bundle: what the replies belong to; the bundle by its digest.
    """

    def __init__(self, root: str, order: Order, bundle: str) -> None:
        self.folder = storage.join(root, f".ledger-{order.digest}-{bundle}")
        self._finished: set[str] = set()
        self._full: set[str] = set()

    def resume(self, plan: Plan) -> int:
        """Feed a new plan all that is here; how many of its requests that finished.

        Raises:
            UserError: a file is damaged.
        """
        replies = self._read(plan)
        kept = {id for id, reply in replies.items() if reply is not None}
        finished = _usable(plan, replies.keys(), kept)
        needed = _needed(plan, finished)
        plan.restore(Snapshot(finished, {id: replies[id] for id in needed & finished}))
        self._finished, self._full = set(finished), kept & finished
        return len(finished)

    def save(self, plan: Plan) -> None:
        """Write what is new since the last time, then empty what has had its use."""
        snapshot = plan.snapshot()
        for id in sorted(snapshot.finished - self._finished):
            self._write(id, snapshot.replies.get(id))
        for id in sorted(self._full - snapshot.replies.keys()):
            self._write(id, None)

    def remove(self) -> None:
        """Forget the order: its result is written elsewhere."""
        fs, root = fsspec.core.url_to_fs(self.folder)
        if storage.exists(self.folder):
            fs.rm(root, recursive=True)
        self._finished, self._full = set(), set()

    def _write(self, id: str, reply: Reply | None) -> None:
        storage.write_bytes(storage.join(self.folder, _name(id)), _encode(reply))
        self._finished.add(id)
        (self._full.discard if reply is None else self._full.add)(id)

    def _read(self, plan: Plan) -> dict[str, Reply | None]:
        ids = {_name(id): id for id in plan.requests}
        paths = {Path(path).name: path for path in storage.listing(f"{self.folder}/*")}
        return {ids[name]: _decode(paths[name]) for name in paths.keys() & ids.keys()}


def _needed(plan: Plan, finished: Set[str]) -> set[str]:
    """Requests whose replies are still wanted, once some are finished."""
    open_ = (request for id, request in plan.requests.items() if id not in finished)
    return {*plan.results, *(need for request in open_ for need in request.needs)}


def _usable(plan: Plan, found: Set[str], kept: Set[str]) -> frozenset[str]:
    """Finished requests, without those whose reply is wanted but gone: they are asked again."""
    finished = set(found)
    while lost := _needed(plan, finished) & finished - kept:
        finished -= lost
    return frozenset(finished)


def _name(id: str) -> str:
    return id.replace("/", "-")


def _encode(reply: Reply | None) -> bytes:
    """A tensor or an array as safetensors; no bytes for no reply."""
    if reply is None:
        return b""
    if isinstance(reply, Tensor):
        return save({"tensor": reply.contiguous()})
    return save({"array": torch.from_numpy(np.ascontiguousarray(reply))})


def _decode(path: str) -> Any:
    content = storage.read_bytes(path)
    if not content:
        return None
    try:
        [(kind, tensor)] = load(content).items()
    except SafetensorError as error:
        raise UserError(f"{path} is damaged; remove its folder to begin anew.") from error
    return tensor if kind == "tensor" else tensor.numpy()
