"""Web addresses: any server will do, and no query of an address is printed or stored."""

import contextlib
import http.server
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from raylarge import pyramid, storage
from raylarge.data import slide_index
from raylarge.data.prepare import prepare
from raylarge.errors import SlideError, UserError
from raylarge.report import Report
from raylarge.slides.reader import open_slide


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYLARGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAYLARGE_STORAGE_PATIENCE_S", "1")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (100, 130, 3), dtype=np.uint8)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as `style` says: full, no-ranges, chunked, redirect, presigned, login, forbidden."""

    protocol_version = "HTTP/1.1"
    style, body, seen = "full", b"", None

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        style, head = self.style, self.command == "HEAD"
        self.seen.append((self.command, self.headers.get("Range")))
        signed = "X-Amz-Signature=S3CR3T" in self.path
        if style == "forbidden" or (style == "presigned" and (head or not signed)):
            return self.answer(403, b"")
        if style == "redirect" and "/elsewhere/" not in self.path:
            return self.answer(302, b"", Location="/elsewhere/a.tif?token=S3CR3T")
        if style == "login":
            return self.answer(200, b"\n<!DOCTYPE html><html>Log in</html>")
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and style in ("full", "redirect", "presigned"):
            start, stop = int(wanted[1]), int(wanted[2] or len(self.body)) + 1
            part = self.body[start:stop]
            place = f"bytes {start}-{start + len(part) - 1}/{len(self.body)}"
            return self.answer(206, part, **{"Content-Range": place, "ETag": '"one"'})
        if style == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if not head:
                for at in range(0, len(self.body), 5000):
                    piece = self.body[at : at + 5000]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")
            return None
        return self.answer(200, self.body)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):  # who asked has read enough
                self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, image):
    """Starts a server of some style; gives the address of a slide."""
    pyramid.write_image(str(tmp_path / "a.tif"), image, 0.5)
    body, servers = (tmp_path / "a.tif").read_bytes(), []

    def start(style):
        handler = type("One", (Server,), {"style": style, "body": body, "seen": []})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/slides/a.tif"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


QUERY = "?X-Amz-Credential=a/b/c&X-Amz-Signature=S3CR3T"


@pytest.mark.parametrize("style", ["full", "no-ranges", "chunked", "redirect", "presigned"])
def test_any_web_server_will_do_and_no_query_is_kept(
    served, image, tmp_path, style, tiny_prepare, capsys, caplog
):
    url = served(style) + QUERY
    with open_slide(url) as slide:
        assert (slide.read(0, 0, *slide.size_px) == image).all()
    config = tiny_prepare(slides=url, verbs="tile,embed", tile={"mask": "all", "scales": [0]})
    prepare(config, Report(str(tmp_path / "report.json")))
    assert list(storage.read_json(f"{config.out}/names.json").values()) == [url.partition("?")[0]]
    assert list(storage.read_json(f"{config.out}/names.json")) == [
        slide_index.pseudonym(config.tile.salt, "a.tif")
    ]
    prepare(config, Report(str(tmp_path / "report.json")))
    files = [path for path in Path(config.out).rglob("*") if path.is_file()]
    assert not [
        path for path in [*files, tmp_path / "report.json"] if b"S3CR3T" in path.read_bytes()
    ]
    spoken = capsys.readouterr()
    assert "S3CR3T" not in spoken.out + spoken.err + caplog.text


def test_a_web_page_in_the_place_of_a_slide_is_one_sentence(served, cache):
    url = served("login")
    with pytest.raises(
        SlideError, match=rf"^slide {url}: the file is a web page and no slide: .*login"
    ):
        open_slide(url + QUERY)
    assert not list(cache.rglob("a.tif"))


def test_a_refused_address_does_not_show_its_query(served, tmp_path, tiny_prepare):
    url = served("forbidden")
    with pytest.raises(UserError, match=rf"{url}: the server answers 403; .*expired") as told:
        open_slide(url.replace("http://", "http://me:S3CR3T@") + QUERY)
    assert "S3CR3T" not in str(told.value)
    config = tiny_prepare(slides=url + QUERY, verbs="tile")
    with pytest.raises(UserError, match="answers 403") as told:
        prepare(config, Report(str(tmp_path / "report.json")))
    assert "S3CR3T" not in str(told.value)


def test_a_fingerprint_over_the_web_fetches_no_whole_slide(served, tmp_path, monkeypatch):
    monkeypatch.setattr(slide_index, "_PEEK_BYTES", 1000)
    content = (tmp_path / "a.tif").read_bytes()
    expected = storage.digest(f"{len(content)} ".encode() + content[:1000] + content[-1000:])
    assert slide_index.fingerprint(served("full")) == slide_index.fingerprint(
        str(tmp_path / "a.tif")
    )
    assert slide_index.fingerprint(served("full")) == expected
    assert slide_index.fingerprint(served("no-ranges")) == slide_index.fingerprint(
        served("no-ranges")
    )
