"""Check that the cluster can run some workers: an error instead of an endless wait.

A Ray that a job started on this machine never grows. On a cluster with an autoscaler more nodes
may come, so there the job waits, and says for what.
"""

from __future__ import annotations

from dataclasses import dataclass

from raylarge import report
from raylarge.compute import session
from raylarge.errors import UserError


@dataclass(frozen=True)
class WorkerResources:
    """What each of several workers needs on one node.

    Attributes:
        title: who needs it, for messages.
        cpus, gpus: of each worker, in Ray's units.
        fewest: with how many workers the work can begin.
        keys: the words of the command line that decide it, for messages.
    """

    title: str
    cpus: float
    gpus: float
    fewest: int = 1
    keys: str = "gpus= or threads="

    @property
    def each(self) -> str:
        """What a worker needs, in words."""
        return f"{self.cpus:g} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")


def require_resources(room: WorkerResources) -> None:
    """Refuse what can never be scheduled; say so where it may be later.

    Raises:
        UserError: no node is large enough, and none will come.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = [_places(node.get("CPU", 0.0), node.get("GPU", 0.0), room) for node in nodes]
    if sum(places) >= room.fewest:
        return
    cpus, gpus = (
        max((node.get(kind, 0.0) for node in nodes), default=0) for kind in ("CPU", "GPU")
    )
    needs = room.each if room.fewest == 1 else f"{room.fewest} times {room.each}"
    lack = (
        f"{room.title} needs {needs} and the largest of {len(nodes)} nodes has {cpus:g} CPUs and "
        f"{gpus:g} GPUs"
    )
    if not session.may_grow():
        raise UserError(
            f"{lack}; lower {room.keys}, or set RAY_ADDRESS to a cluster that has them."
        )
    report.say(f"{lack}: waiting for more nodes")


def _places(cpus: float, gpus: float, room: WorkerResources) -> int:
    """How many workers fit on a node."""
    rooms = [room.fewest]
    rooms += [int((cpus + 1e-6) // room.cpus)] if room.cpus else []
    rooms += [int((gpus + 1e-6) // room.gpus)] if room.gpus else []
    return min(rooms)
