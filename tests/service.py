"""The API in this process, without Ray, for the tests of the service."""

import asyncio
from pathlib import Path

import httpx

from raylarge.sampling.bundle_facts import BundleFacts
from raylarge.serve.api import Api
from raylarge.serve.order_queue import OrderQueue, ServiceLimits

SMALL = {"size": 64, "sampler": {"steps": 1}}


class Service:
    """The API over a queue in this process, whose worker answers when the gate is open."""

    def __init__(self, worker, **limits):
        self.worker, self.gate, self.asked = worker, asyncio.Event(), 0
        self.queue = OrderQueue(self.answer, self.facts, ServiceLimits(**limits))
        transport = httpx.ASGITransport(Api(self.queue).app())
        self.http = httpx.AsyncClient(transport=transport, base_url="http://here")

    async def facts(self):
        return BundleFacts.of(self.worker.bundle)

    async def answer(self, task, **inputs):
        self.asked += 1
        await self.gate.wait()
        return self.worker.answer(task, **inputs)

    async def post(self, values=SMALL, **more):
        return await self.http.post("/v1/images", json={**values, **more})

    async def state(self, id, *until):
        while True:
            state = (await self.http.get(f"/v1/images/{id}")).json()
            if not until or state["state"] in until:
                return state
            await asyncio.sleep(0.01)


def serving(worker, talk, **limits):
    async def main():
        service = Service(worker, **limits)
        try:
            async with service.http:
                await asyncio.wait_for(talk(service), 60)
        finally:
            service.queue.close()
            scratch = Path(service.queue._scratch.name)
        assert not scratch.exists()

    asyncio.run(main())
