"""Images handed to `jobs/sample.py image=` and to the service: read by one rule, or refused."""

import asyncio
import base64
import io

import httpx
import numpy as np
import pytest
from PIL import Image

from jobs import sample as job
from raylarge import images
from raylarge.errors import UserError
from raylarge.models import bundle
from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.serve.api import Api
from raylarge.serve.order_queue import OrderQueue, ServiceLimits
from raylarge.workers.worker import Worker

y, x = np.mgrid[:64, :64]
GREY = (90 + x + y).astype(np.uint8)
RGB = np.repeat(GREY[..., None], 3, axis=-1)
CHEAP = {"steps": 1, "corrections": 1, "derivative": "difference"}


def png(array):
    sink = io.BytesIO()
    Image.fromarray(array).save(sink, "PNG")
    return sink.getvalue()


CLEAR = np.dstack([RGB // 2, np.zeros_like(GREY)])
BROKEN = {
    "text": (b"no picture", "is no PNG, JPEG or TIFF image"),
    "cut": (png(RGB)[: len(png(RGB)) // 2], "is damaged or incomplete"),
    "blank": (b"\n", "is no PNG"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no PNG"),
}


def test_the_job_scales_deep_grey_and_refuses_what_is_none(tiny_bundle, tmp_path):
    words = [f"bundle={tiny_bundle}", "order.source.octaves=1", "order.batch=4"]
    words += [f"order.sampler.{key}={value}" for key, value in CHEAP.items()]
    made = {}
    for name, content in (("8", png(GREY)), ("16", png(GREY.astype(np.uint16) * 257))):
        (tmp_path / f"{name}.png").write_bytes(content)
        job.main([*words, f"image={tmp_path / name}.png", f"out={tmp_path / name}"])
        made[name] = images.read_png(str(tmp_path / name / "image.png"))[0]
    assert (made["8"] == made["16"]).all()
    for name, (content, why) in BROKEN.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(UserError, match=rf"^image=.*{name}\.png {why}"):
            job.main([*words, f"image={tmp_path / name}.png", f"out={tmp_path / name}"])
        assert not (tmp_path / name).exists()
    with pytest.raises(UserError, match="octaves"):
        job.main([*words, f"image={tmp_path / '8.png'}", "order.source.octaves=two", "out=o"])


def test_the_service_refuses_at_once_before_any_worker(tiny_bundle):
    worker, asked = Worker(bundle.load(tiny_bundle)), []

    async def answer(task, **inputs):
        asked.append(task)
        return worker.answer(task, **inputs)

    async def facts():
        return BundleFacts.of(worker.bundle)

    async def talk():
        desk = OrderQueue(answer, facts, ServiceLimits())
        transport = httpx.ASGITransport(Api(desk).app())
        pictures = {}
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                for content, why in BROKEN.values():
                    reply = await http.post("/v1/images", json=order_of(content))
                    assert reply.status_code == 422
                    assert why in reply.json()["detail"]
                reply = await http.post("/v1/images", json=order_of(png(RGB[:32])))
                assert (reply.status_code, asked) == (422, [])
                for name, array in (("clear", CLEAR), ("white", np.full_like(RGB, 255))):
                    ticket = (await http.post("/v1/images", json=order_of(png(array)))).json()
                    while (await http.get(ticket["links"]["self"])).json()["state"] != "done":
                        await asyncio.sleep(0.02)
                    pictures[name] = (
                        await http.get(f"{ticket['links']['self']}/image.png")
                    ).content
        finally:
            desk.close()
        first, second = (images.from_bytes(content) for content in pictures.values())
        assert (first == second).all()

    asyncio.run(asyncio.wait_for(talk(), 60))


def order_of(content):
    source = {"image": base64.b64encode(content).decode(), "octaves": 1}
    return {"size": 128, "algorithm": "superres", "source": source, "sampler": CHEAP, "batch": 4}
