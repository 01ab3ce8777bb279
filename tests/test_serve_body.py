"""Bodies of requests: what is no order is refused at once, in JSON that any client reads."""

import pytest
from service import serving

from raylarge.models import bundle
from raylarge.workers.worker import Worker


@pytest.fixture(scope="module")
def worker(tiny_bundle):
    return Worker(bundle.load(tiny_bundle))


HOSTILE = [
    b"",
    b"null",
    b'"size"',
    b"\xff\xfe\xfa",
    b'{"size": "\xc3("}',
    b'{"size": NaN}',
    b'{"size": 64, "sampler": {"correction_lr": Infinity}}',
    b'{"size": 64, "sampler": {"correction_lr": -Infinity}}',
    b'{"size": 64, "sampler": {"correction_lr": 1e999}}',
    b'{"size": 64, "size": 128}',
    b'{"size": "\\ud800"}',
    b'{"recipe": "\\ud800\\udfff"}',
    b'{"\\ud800": 1}',
    b'{"sampler": {"\\udc80": 1}}',
    b'{"size": 64, "algorithm": "\\udcff"}',
    b'{"size": 64, "condition": {"kind": "\\udcff"}}',
    b'{"size": 64, "condition": {"kind": "embeddings", "data": "\\udcff", "shape": [1, 1, 8]}}',
    b'{"size": 64, "seed": ' + b"9" * 3000 + b"}",
    b'{"size": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"condition": ' * 500 + b"1" + b"}" * 500,
    b'{"size": {"rows": 64}}',
    b'{"size": [64, 64, 64]}',
    b'{"size": true}',
    b'{"size": 64, "sampler": []}',
    b'{"size": 64, "sampler": "fast"}',
    b'{"size": 64, "condition": 3}',
    b'{"size": 64, "levels": 5}',
    b'{"size": 64, "levels": {"a": 1}}',
    b'{"size": 64, "condition": {"kind": "embeddings", "shape": [1e400]}}',
    b'{"size": 64, "condition": {"kind": "embeddings", "shape": 8}}',
    b'{"size": 64, "sampler": {"interval": [null, 1]}}',
    b'{"size": 64, "source": {"octaves": "two"}}',
    b'{"size": 64, "seed": -1}',
    b'{"size": 64, "batch": 0}',
    b'{"size": 64, "chunk": 0}',
    b'{"count": -1}',
    b'{"": 1}',
    b'{"a.b": 1}',
    b'{"size": 64, "x": "\\u0000"}',
]


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: ascii(body[:40]))
def test_hostile_bodies_are_refused_at_once(worker, body):
    async def talk(service):
        answer = await service.http.post("/v1/images", content=body)
        assert answer.status_code == 422, answer.text
        assert answer.json()["detail"]
        assert len(answer.content) < 9000
        assert service.asked == 0

    serving(worker, talk)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 202),
        ("application/json; charset=utf-8", 202),
        ("application/vnd.order+json", 202),
        ("", 202),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("\xe4", 415),
    ],
)
def test_other_content_types_are_refused(worker, kind, status):
    async def talk(service):
        headers = {"content-type": kind.encode("latin-1")}
        content = b'{"size": 64, "sampler": {"steps": 1}}'
        answer = await service.http.post("/v1/images", content=content, headers=headers)
        assert answer.status_code == status, answer.text
        assert answer.json()

    serving(worker, talk)


def test_a_body_is_measured_before_it_is_read(worker):
    async def endless():
        while True:
            yield b" " * 1000

    async def talk(service):
        for headers in ({"content-length": "99999999999"}, {}):
            answer = await service.http.post("/v1/images", content=endless(), headers=headers)
            assert answer.status_code == 413
            assert "at most 4096 bytes" in answer.json()["detail"]

    serving(worker, talk, body_bytes=4096)


def test_names_of_images_are_echoed_harmlessly(worker):
    async def talk(service):
        for name in ("%ff%fe", "%ED%A0%80", "x" * 5000, "%00", "%E2%80%AE"):
            answer = await service.http.get(f"/v1/images/{name}")
            assert answer.status_code == 404
            assert answer.json()["detail"].isascii()
            assert len(answer.content) < 500

    serving(worker, talk)
