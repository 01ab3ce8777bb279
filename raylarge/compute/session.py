"""Ray sessions: the running one, the cluster that RAY_ADDRESS names, or a local one of our own.

A session of our own runs on this machine alone, sends no statistics, prints nothing and ends with
its block; its logs are copied to a folder if one is named.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raylarge.interrupts import postponed

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # One line instead of a page for every worker that dies: whoever asked it says what follows.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed|infinite retries remaining",
    # Threads that wait by spinning cost a busy machine tenfold.
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_RAY_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [DIWE] \d+ \d+\] ")
"""How lines of Ray's C++ begin, from debug to error; fatal ones (C) are not among them."""
_LAST_LINES_S = 2.0
"""How long the end of a session waits for the last lines of descriptor 2."""
_own: list[Path] = []
"""The folder of the logs of the Ray that this process has started."""


@contextmanager
def session(workers: int, logs: str = "") -> Iterator[None]:
    """Be connected to Ray inside the block.

    Args:
        workers: one-CPU workers that must find room, however few cores the machine has.
        logs: a local folder for the logs of a session of ours; "" leaves them in Ray's own.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray  # after the environment: Ray reads it when it is imported

    if ray.is_initialized():
        yield
        return
    with _native_stderr(logs):
        try:
            with postponed():
                if os.environ.get("RAY_ADDRESS"):
                    ray.init(log_to_driver=False, logging_level="error")
                else:
                    _own.append(_start(workers))
            yield
        finally:
            with postponed():
                ray.shutdown()
                while _own:
                    keep_logs(_own.pop(), logs)


def may_grow() -> bool:
    """Return whether nodes may join the Ray in use: a Ray of our own has one node for ever.

    A cluster whose autoscaler has said nothing counts as one that may grow if it has one.
    """
    from ray._private.state import state
    from ray.experimental.internal_kv import _internal_kv_get

    if _own:
        return False
    reported = state.get_max_resources_from_cluster_config()
    return bool(reported) or _internal_kv_get(b"__autoscaling_status") is not None


@contextmanager
def _native_stderr(logs: str) -> Iterator[None]:
    """Keep what Ray's C++ writes to descriptor 2 off the terminal; ours still gets through.

    It goes to LOGS/native.log. Without `logs` lines of Ray's log are dropped, as its own files
    have them, and all others (a fatal check among them) pass.
    """
    before, terminal = sys.stderr, os.dup(2)
    passing = None
    if logs:
        Path(logs).mkdir(parents=True, exist_ok=True)
        with Path(logs, "native.log").open("ab") as log:
            os.dup2(log.fileno(), 2)
    else:
        source, sink = os.pipe()
        passing = threading.Thread(target=_pass_on, args=(source, os.dup(terminal)), daemon=True)
        passing.start()
        os.dup2(sink, 2)
        os.close(sink)
    sys.stderr = os.fdopen(terminal, "w", buffering=1)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        sys.stderr.close()
        sys.stderr = before
        if passing is not None:
            passing.join(_LAST_LINES_S)


def _pass_on(source: int, terminal: int) -> None:
    """Copy lines from a pipe to the terminal, without those of Ray's log."""
    with open(source, "rb") as lines, suppress(OSError):
        for line in lines:
            if not _RAY_LINE.match(line):
                os.write(terminal, line)


def _start(workers: int) -> Path:
    """Start Ray on this machine; the folder of its logs."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=max(len(os.sched_getaffinity(0)), workers),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    return Path(context.address_info["session_dir"], "logs")


def keep_logs(source: Path, logs: str) -> None:
    """Copy what Ray logged to a folder, if one is given."""
    if not logs:
        return
    shutil.copytree(
        source, logs, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("*.sock*")
    )
