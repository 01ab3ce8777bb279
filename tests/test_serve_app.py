"""The service: what its HTTP says, without Ray."""

import logging
import re
import socket
from pathlib import Path

import numpy as np
import psutil
import pytest
from service import serving

from raylarge import images
from raylarge.errors import UserError
from raylarge.models import bundle
from raylarge.serve import app
from raylarge.workers.worker import Worker

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def worker(tiny_bundle):
    return Worker(bundle.load(tiny_bundle))


@pytest.mark.usefixtures("one_thread")
def test_an_order_becomes_a_marked_picture(worker, law_order, law_image):
    async def talk(service):
        answer = await service.post(law_order)
        assert answer.status_code == 202
        state = answer.json()
        image = f"/v1/images/{state['id']}/image.png"
        assert (state["state"], state["progress"], state["error"]) == ("queued", 0.0, None)
        assert (await service.http.get(image)).status_code == 409
        service.gate.set()
        state = await service.state(state["id"], "done", "failed")
        assert (state["state"], state["progress"]) == ("done", 1.0)
        assert state["seconds"] > 0
        assert state["links"]["image"] == image
        picture = await service.http.get(image)
        assert picture.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(images.from_bytes(picture.content), law_image)
        for mark in (b"Synthetic", b"novel", state["order_digest"].encode()):
            assert mark in picture.content
        guide = await service.http.get(state["links"]["guide"])
        assert images.from_bytes(guide.content).shape == (64, 64, 3)
        order = (await service.http.get(state["links"]["order"])).json()
        assert (order["size"], order["sampler"]["guidance"]) == ([128, 192], 2.0)

        forgotten = await service.http.delete(state["links"]["self"])
        assert forgotten.json()["state"] == "done"
        assert (await service.http.get(image)).status_code == 404

    serving(worker, talk)


def test_a_single_patch_has_no_guide(worker):
    async def talk(service):
        service.gate.set()
        id = (await service.post()).json()["id"]
        assert "guide" not in (await service.state(id, "done"))["links"]
        assert (await service.http.get(f"/v1/images/{id}/guide.png")).status_code == 404

    serving(worker, talk)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ('{"size": 100}', 422, "multiples of the patch side 64"),
        ('{"size": 64, "sampler": {"stepz": 3}}', 422, "did you mean 'sampler.step"),
        ('{"size": 1e999}', 422, "size=inf does not fit; give a number of pixels"),
        ('{"size": "${oc.env:HOME}"}', 422, "size=.*oc.env.* does not fit"),
        ('{"size": 64, "seed": 100000000000000000000}', 422, "seed"),
        ('{"size": 64, "batch": 1000000000}', 422, "batch=1000000000: it must be from 1 to 1024"),
        ('{"size": 64, "batch": 1000}', 422, "asks for 1000 batch"),
        ('{"count": 1000000000}', 422, "asks for 1000000000 windows"),
        ('{"count": 1, "sampler": {"steps": 900, "corrections": 999}}', 422, "for 900000 passes"),
        ('{"size": 64, "sampler": {"guidance": 1e308}}', 422, "guidance=1e.308: it must be from 0"),
        ('{"size": 64, "sampler": {"correction_lr": NaN}}', 422, "the body is not JSON"),
        ('{"size": 64, "scale": ' + "9" * 400 + "}", 422, "scale=a whole number of 1329 bits"),
        ('{"size": 64, "levels": [1e999]}', 422, "levels=.inf. does not fit; give a list"),
        ('{"size": 64, "condition": {"shape": [1, "x"]}}', 422, "shape=.1,x. does not fit"),
        ('{"size": 64, "condition": {"kind": "\\ud800"}}', 422, "kind=.*ud800: it must be one of"),
        ('{"\\ud800": 64}', 422, "unknown key"),
        ('{"size": {"a": [{}]}}', 422, "size"),
        ('{"recipe": {}}', 422, "recipe={...} does not fit"),
        ('{"sampler": [1]}', 422, "its keys one by one"),
        ('{"size": 64, "condition": {"kind": "embeddings", "data": "?", "shape": [1, 1, 8]}}', 422,
         "does not hold"),
        ("[1]", 422, "an order is a JSON object"),
        ("{", 422, "the body is not JSON"),
        ('{"size": 64, "sampler": {"guidance": NaN}}', 422, "the body is not JSON"),
        ('{"size": 64, "sampler": {"correction_lr": -Infinity}}', 422, "the body is not JSON"),
        ("[" * 3000, 422, "the body is not JSON"),
        ("\xff", 422, "the body is not JSON"),
        ('{"a": "' + "x" * 5000 + '"}', 413, "at most 4096 bytes"),
    ],
)  # fmt: skip
def test_an_order_that_is_no_order_is_one_sentence(worker, body, status, says, monkeypatch):
    monkeypatch.setenv("HOME", "a-secret")

    async def talk(service):
        answer = await service.http.post("/v1/images", content=body.encode("latin-1"))
        assert answer.status_code == status
        detail = answer.json()["detail"]
        assert "a-secret" not in detail
        assert "\n" not in detail
        assert re.search(says, detail)
        assert service.asked == 0

    serving(worker, talk, body_bytes=4096)


def test_unknown_images_are_not_found(worker):
    async def talk(service):
        for path in ("", "/image.png", "/guide.png", "/order"):
            answer = await service.http.get(f"/v1/images/nobody{path}")
            assert answer.status_code == 404
            assert "there is no image 'nobody'" in answer.json()["detail"]
        assert (await service.http.delete("/v1/images/nobody")).status_code == 404

    serving(worker, talk)


def test_orders_wait_their_turn_and_too_many_are_turned_away(worker):
    async def talk(service):
        first, second, third = [(await service.post(seed=seed)).json()["id"] for seed in range(3)]
        await service.state(first, "running")
        assert (await service.state(second))["state"] == "queued"
        full = await service.post()
        assert full.status_code == 429
        assert full.headers["retry-after"]
        assert "2 orders are waiting" in full.json()["detail"]

        await service.http.delete(f"/v1/images/{second}")
        assert (await service.state(second))["state"] == "cancelled"
        assert (await service.post(seed=9)).status_code == 202
        await service.http.delete(f"/v1/images/{first}")
        await service.state(first, "cancelled")
        await service.state(third, "running")
        answer = await service.http.get(f"/v1/images/{first}/image.png")
        assert answer.status_code == 409
        assert "cancelled" in answer.json()["detail"]
        service.gate.set()
        await service.state(third, "done")

    serving(worker, talk, running=1, queued=2)


def test_only_so_many_results_are_kept(worker):
    async def talk(service):
        service.gate.set()
        ids = []
        for seed in range(4):
            ids.append((await service.post(seed=seed)).json()["id"])
            await service.state(ids[-1], "done")
        found = [(await service.http.get(f"/v1/images/{id}")).status_code for id in ids]
        assert found == [404, 404, 200, 200]
        assert len(list(Path(service.queue._scratch.name).iterdir())) == 2

    serving(worker, talk, kept=2)


def test_failures_are_told_apart(worker, caplog):
    """A user's mistake is told whole, a fault of ours by its kind; the log has the rest."""

    async def talk(service):
        service.gate.set()
        values = {"kind": "embeddings", "data": "AAA=", "shape": [1, 1, 1]}
        answer = await service.post(condition=values)
        assert answer.status_code == 422
        assert "have 1 channels, the bundle's Summarizer takes 8" in answer.text

        async def mistaken(task, **inputs):
            raise UserError("five workers in a row were lost.")

        before, service.queue._answer = service.queue._answer, mistaken
        id = (await service.post()).json()["id"]
        state = await service.state(id, "failed")
        assert state["error"] == "five workers in a row were lost."
        service.queue._answer = before

        async def broken(task, **inputs):
            raise ZeroDivisionError("at /secret/path")

        service.queue._answer = broken
        id = (await service.post()).json()["id"]
        state = await service.state(id, "failed")
        assert state["error"] == "the service failed (ZeroDivisionError); its log says more."
        assert (await service.http.get(f"/v1/images/{id}/image.png")).status_code == 409

    with caplog.at_level(logging.ERROR):
        serving(worker, talk)
    assert "at /secret/path" in caplog.text


def test_the_bundle_tells_what_it_takes(worker):
    async def talk(service):
        facts = (await service.http.get("/v1/bundle")).json()
        assert facts["patch"]["side_px"] == 64
        assert facts["scales"] == [0, 1, 2, 3]
        assert facts["largest_px"] == 512
        assert facts["embedding_channels"] == 8
        assert facts["cdm"] is True
        assert (await service.http.get("/healthz")).status_code == 200

    serving(worker, talk)


def test_nothing_starts_on_a_mistake(tiny_bundle, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use .* port={port + 1}"):
            app.start(tiny_bundle, port)
    with pytest.raises(UserError, match="there is no bundle at"):
        app.start(str(tmp_path), 0)
    with pytest.raises(UserError, match="there is no bundle at"):
        app.build({"bundle": str(tmp_path)})
    with pytest.raises(UserError, match="unknown key 'bundl'; did you mean 'bundle'"):
        app.build({"bundl": tiny_bundle})
    app.stop()
    assert "ray" not in [process.name() for process in psutil.Process().children()]
