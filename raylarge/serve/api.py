"""The HTTP API of the image service.

POST   /v1/images                  an order as JSON -> 202, where to look
GET    /v1/images/{id}             state, progress, seconds, links
GET    /v1/images/{id}/image.png   409 until it is done; also /guide.png
GET    /v1/images/{id}/order       the order with all its settings
DELETE /v1/images/{id}             cancel; forget, if it has ended
GET    /v1/bundle, /healthz
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse

from raylarge.errors import UserError
from raylarge.serve.body import Json, read_order
from raylarge.serve.order_queue import FullError, Job, OrderQueue


class Api:
    """The routes of the API, over one queue of orders.

    Args:
        queue: where orders go; closed when the application shuts down.
    """

    def __init__(self, queue: OrderQueue) -> None:
        self._queue = queue

    def app(self) -> FastAPI:
        """The application; its documentation page would load scripts from elsewhere: none."""
        app = FastAPI(title="raylarge", lifespan=self._lifespan, docs_url=None, redoc_url=None)
        app.router.default_response_class = Json
        route = app.add_api_route
        route("/v1/images", self.submit, methods=["POST"], status_code=202)
        route("/v1/images/{id}", self.state, methods=["GET"])
        route("/v1/images/{id}", self.cancel, methods=["DELETE"])
        route("/v1/images/{id}/order", self.order, methods=["GET"])
        route("/v1/images/{id}/image.png", self.image, methods=["GET"])
        route("/v1/images/{id}/guide.png", self.guide, methods=["GET"])
        route("/v1/bundle", self.bundle, methods=["GET"])
        route("/healthz", self.health, methods=["GET"])
        app.add_exception_handler(UserError, _refused)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        self._queue.close()

    async def submit(self, request: Request) -> Any:
        """Take an order."""
        values = await read_order(request, self._queue.limits.body_bytes)
        try:
            return _document(await self._queue.submit(values))
        except FullError as error:
            raise HTTPException(429, str(error), {"Retry-After": "10"}) from error

    async def state(self, id: str) -> Any:
        """How an order stands."""
        return _document(self._job(id))

    async def cancel(self, id: str) -> Any:
        """Cancel an order, or forget one that has ended."""
        job = self._job(id)
        self._queue.cancel(job)
        return _document(job)

    async def order(self, id: str) -> Any:
        """The order with all its settings, as it may be posted again."""
        return FileResponse(self._job(id).folder / "order.json", media_type="application/json")

    async def image(self, id: str) -> Any:
        """The picture."""
        return self._file(id, "image.png")

    async def guide(self, id: str) -> Any:
        """The guide of a large image."""
        return self._file(id, "guide.png")

    async def bundle(self) -> Any:
        """What orders the bundle takes."""
        facts = await self._queue.facts()
        patch = facts.patch
        return {
            "digest": facts.digest,
            "patch": asdict(patch),
            "scales": list(range(patch.scales)),
            "largest_px": patch.side_px << (patch.scales - 1),
            "embedding_channels": facts.channels,
            "cdm": facts.cdm,
        }

    async def health(self) -> Any:
        """That the service listens."""
        return {"status": "ok"}

    def _job(self, id: str) -> Job:
        job = self._queue.find(id)
        if job is None:
            name = ascii(id[:64])
            raise HTTPException(404, f"there is no image {name}; it may have been forgotten.")
        return job

    def _file(self, id: str, name: str) -> FileResponse:
        job = self._job(id)
        if job.state != "done":
            raise HTTPException(409, f"the image is {job.state}. {job.error}".strip())
        path = job.folder / name
        if not path.exists():
            raise HTTPException(404, f"this order has no {name}.")
        return FileResponse(path, media_type="image/png")


def _document(job: Job) -> dict[str, Any]:
    """A job as clients see it."""
    root = f"/v1/images/{job.id}"
    links = {"self": root, "order": f"{root}/order"}
    if job.state == "done":
        files = [name for name in ("image.png", "guide.png") if (job.folder / name).exists()]
        links |= {name.removesuffix(".png"): f"{root}/{name}" for name in files}
    return {
        "id": job.id,
        "state": job.state,
        "progress": round(job.progress, 4),
        "seconds": round(job.seconds, 2),
        "error": job.error or None,
        "order_digest": job.digest,
        "links": links,
    }


async def _refused(request: Request, error: Exception) -> Json:
    return Json({"detail": str(error)}, 422)
