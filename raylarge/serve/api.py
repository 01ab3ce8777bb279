"""The HTTP face of a desk.

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
    """The routes over one desk.

    Args:
        desk: where orders go; closed when the application shuts down.
    """

    def __init__(self, desk: OrderQueue) -> None:
        self._desk = desk

    def app(self) -> FastAPI:
        """The application; its documentation page would load scripts from elsewhere: none."""
        app = FastAPI(title="raylarge", lifespan=self._lifespan, docs_url=None, redoc_url=None)
        app.router.default_response_class = Json
        route = app.add_api_route
        route("/v1/images", self.take, methods=["POST"], status_code=202)
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
        self._desk.close()

    async def take(self, request: Request) -> Any:
        """Take an order."""
        values = await read_order(request, self._desk.limits.body_bytes)
        try:
            return _document(await self._desk.take(values))
        except FullError as error:
            raise HTTPException(429, str(error), {"Retry-After": "10"}) from error

    async def state(self, id: str) -> Any:
        """How an order stands."""
        return _document(self._ticket(id))

    async def cancel(self, id: str) -> Any:
        """Cancel an order, or forget one that has ended."""
        ticket = self._ticket(id)
        self._desk.cancel(ticket)
        return _document(ticket)

    async def order(self, id: str) -> Any:
        """The order with all its settings, as it may be posted again."""
        return FileResponse(self._ticket(id).folder / "order.json", media_type="application/json")

    async def image(self, id: str) -> Any:
        """The picture."""
        return self._file(id, "image.png")

    async def guide(self, id: str) -> Any:
        """The guide of a large image."""
        return self._file(id, "guide.png")

    async def bundle(self) -> Any:
        """What orders the bundle takes."""
        facts = await self._desk.facts()
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

    def _ticket(self, id: str) -> Job:
        ticket = self._desk.find(id)
        if ticket is None:
            name = ascii(id[:64])
            raise HTTPException(404, f"there is no image {name}; it may have been forgotten.")
        return ticket

    def _file(self, id: str, name: str) -> FileResponse:
        ticket = self._ticket(id)
        if ticket.state != "done":
            raise HTTPException(409, f"the image is {ticket.state}. {ticket.error}".strip())
        path = ticket.folder / name
        if not path.exists():
            raise HTTPException(404, f"this order has no {name}.")
        return FileResponse(path, media_type="image/png")


def _document(ticket: Job) -> dict[str, Any]:
    """A ticket as clients see it."""
    root = f"/v1/images/{ticket.id}"
    links = {"self": root, "order": f"{root}/order"}
    if ticket.state == "done":
        files = [name for name in ("image.png", "guide.png") if (ticket.folder / name).exists()]
        links |= {name.removesuffix(".png"): f"{root}/{name}" for name in files}
    return {
        "id": ticket.id,
        "state": ticket.state,
        "progress": round(ticket.progress, 4),
        "seconds": round(ticket.seconds, 2),
        "error": ticket.error or None,
        "order_digest": ticket.digest,
        "links": links,
    }


async def _refused(request: Request, error: Exception) -> Json:
    return Json({"detail": str(error)}, 422)
