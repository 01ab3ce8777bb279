"""A real S3 server (moto's, over HTTP on loopback) behind a line that can be cut.

    storage ── TCP ──▶ Line ── TCP ──▶ moto

The line forwards bytes. On demand it cuts a connection after so many bytes, answers in the
server's place, swallows what is sent, or is gone, port and all. A stopped server's objects are
those of this process, so they stand again when it starts.
"""

import contextlib
import os
import socket
import struct
import threading
from dataclasses import dataclass

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from raylarge import storage
from raylarge.storage import retry

HOST = "127.0.0.1"
BUSY = (
    "HTTP/1.1 {status} Busy\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\n"
    "Connection: close\r\n\r\n{body}"
)


@dataclass
class Fault:
    """What shall happen to the bytes of one direction, once `after` of them have passed."""

    kind: str  # cut, close, swallow, answer
    upwards: bool = True
    after: int = 0
    times: int = 1
    status: int = 503
    code: str = "SlowDown"


class Line:
    """A TCP line to a port on loopback."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.faults: list[Fault] = []
        self.met = 0  # faults that happened
        self.requests: list[bytes] = []  # first lines of what was sent
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = None
        self.port = 0
        self.up()

    def up(self) -> None:
        """Be there, on the same port as before."""
        self._listener = socket.create_server((HOST, self.port), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        """Be gone: connections are reset, new ones refused."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        with self._lock:
            left, self._open = self._open, set()
        for one in left:
            _end(one, reset=True)

    def fail(self, kind: str, **more) -> None:
        self.faults.append(Fault(kind, **more))

    def clear(self) -> None:
        self.faults.clear()
        self.requests.clear()
        self.met = 0

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((HOST, self.target), timeout=5)
            except OSError:
                _end(near, reset=True)
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near, far}
            for ends in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                if upwards and content.startswith(
                    (b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")
                ):
                    self.requests.append(content.split(b"\r\n", 1)[0])
                passed, fault = self._taken(content, upwards)
                if fault is None or fault.kind in ("cut", "close"):
                    sink.sendall(passed)
                if fault is not None and fault.kind != "swallow":
                    if fault.kind == "answer":
                        source.sendall(_answer(fault, bodiless=content.startswith(b"HEAD")))
                    break_off = fault.kind == "cut"
                    _end(source, break_off)
                    _end(sink, break_off)
                    return
        for one in (source, sink):
            _end(one, reset=False)

    def _taken(self, content: bytes, upwards: bool) -> tuple[bytes, Fault | None]:
        """What may still pass of some bytes, and the fault that happens then."""
        with self._lock:
            for fault in self.faults:
                if fault.upwards != upwards:
                    continue
                if len(content) < fault.after:
                    fault.after -= len(content)
                    return content, None
                self.met += 1
                fault.times -= 1
                if not fault.times:
                    self.faults.remove(fault)
                return content[: fault.after], fault
        return content, None


class Store:
    """A server with one bucket, and the line to it."""

    def __init__(self) -> None:
        self.port = 0
        self.start_server()
        self.line = Line(self.port)
        self.url = f"http://{HOST}:{self.line.port}"
        self.direct = f"http://{HOST}:{self.port}"

    def start_server(self) -> None:
        self.server = ThreadedMotoServer(ip_address=HOST, port=self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self) -> None:
        """Stop the server while it works; the line is gone too."""
        self.line.down()
        self.server.stop()

    def start(self) -> None:
        """Start it again, at the same address."""
        self.start_server()
        self.line.up()


def _answer(fault: Fault, bodiless: bool) -> bytes:
    body = f"<Error><Code>{fault.code}</Code><Message>so</Message></Error>"
    body = "" if bodiless else body
    return BUSY.format(status=fault.status, length=len(body), body=body).encode()


def _end(one: socket.socket, reset: bool) -> None:
    with contextlib.suppress(OSError):
        if reset:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A thread that waits in recv would keep the socket open; half a shutdown tells nobody.
        one.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
    one.close()


@pytest.fixture(scope="module")
def machine():
    """A server with a bucket, and the line to it."""
    patch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ACCESS_KEY_ID", "testing")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    store = Store()
    patch.setenv("AWS_ENDPOINT_URL", store.url)
    client = boto3.client("s3", endpoint_url=store.direct)
    client.create_bucket(Bucket="faults")
    store.client = client
    yield store
    store.stop()
    patch.undo()


@pytest.fixture
def store(machine, monkeypatch, request):
    """The server for one test, with little patience, and its folder."""
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "4")
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.03)
    machine.root = f"s3://faults/{request.node.name.replace('[', '-').strip(']')}"
    storage.write_bytes(f"{machine.root}/first", b"the session stands")
    machine.line.clear()
    yield machine
    machine.line.clear()


def content_of(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


def keys(store):
    prefix = store.root.removeprefix("s3://faults/") + "/"
    found = store.client.list_objects_v2(Bucket="faults", Prefix=prefix).get("Contents", [])
    return {one["Key"].removeprefix(prefix): one["Size"] for one in found}


def uploads(store):
    return store.client.list_multipart_uploads(Bucket="faults").get("Uploads", [])
