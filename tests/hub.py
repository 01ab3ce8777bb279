"""A hub on loopback, as much of it as a client asks for when it fetches files."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0" * 40


def redirect(monkeypatch, url, cache):
    """Send the hub's client, which read its environment when it was imported, to a URL."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


class Hub:
    def __init__(self):
        self.files = {}  # repository -> name -> content
        self.gated = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def log_message(self, *_):
        pass

    def _answer(self, with_body):
        parts = self.path.split("?")[0].strip("/").split("/")
        status, headers, body = self._info(parts) if parts[0] == "api" else self._file(parts)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _file(self, parts):
        """/OWNER/NAME/resolve/main/FILE"""
        repository, name = "/".join(parts[:2]), "/".join(parts[4:])
        if repository in self.hub.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if name not in self.hub.files.get(repository, {}):
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        body = self.hub.files[repository][name]
        etag = hashlib.sha1(body).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body

    def _info(self, parts):
        """/api/models/OWNER/NAME[/revision/main | /tree/...]"""
        repository = "/".join(parts[2:4])
        names = sorted(self.hub.files.get(repository, {}))
        if "tree" in parts:
            files = self.hub.files[repository]
            listed = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT}
                for name in names
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listed).encode()
        siblings = [{"rfilename": name} for name in names]
        told = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        return 200, {"Content-Type": "application/json"}, json.dumps(told).encode()
