"""Routes that say how things stand: models, health, readiness, metrics, workers, records of requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

import disagg
from disagg.api.http.errors import ApiError, no_workers
from disagg.api.http.responses import json_response
from disagg.api.settings import ApiSettings
from disagg.router.generation import AdminBackend, Backend

T = TypeVar("T")


class StatusRoutes:
    def __init__(self, backend: Backend, settings: ApiSettings) -> None:
        self._backend = backend
        self._name = settings.served_model_name
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self._name:
            raise ApiError(404, f"the model `{name}` does not exist", param="model", code="model_not_found")
        return json_response(self._model())

    def _model(self) -> dict[str, object]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "disagg",
            "root": self._name,
            "parent": None,
            "max_model_len": self._backend.max_model_len(),
        }

    async def health(self, request: Request) -> Response:
        """This process answers: nothing more, so that a supervisor does not restart a router for lack of workers."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether a request could be placed now."""
        if not self._backend.is_ready():
            raise no_workers()
        return json_response({"status": "ready"})

    async def version(self, request: Request) -> Response:
        return json_response({"version": disagg.__version__})

    async def metrics(self, request: Request) -> Response:
        text = await settled(self._backend.metrics)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def workers(self, request: Request) -> Response:
        return await _workers(self._backend)


class AdminRoutes:
    def __init__(self, backend: AdminBackend) -> None:
        self._backend = backend

    async def request(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        if not request_id:
            raise ApiError(404, "expected a request's id in the path: `/requests/{X-Request-Id}`")
        record = self._backend.record(request_id)
        if record is None:
            raise ApiError(404, f"no record of a request `{request_id}`: unknown, or too long ago")
        return json_response(dict(record))

    async def workers(self, request: Request) -> Response:
        return await _workers(self._backend)

    async def drain(self, request: Request) -> Response:
        """POST: empty the worker, whose answers go on elsewhere. DELETE: give it requests again."""
        worker_id, draining = request.path_params["worker_id"], request.method == "POST"
        if not self._backend.drain(worker_id, draining):
            raise ApiError(404, f"no worker `{worker_id}` is registered", code="worker_not_found")
        return json_response({"worker": worker_id, "draining": draining})


async def _workers(backend: Backend) -> Response:
    return json_response({"workers": await settled(backend.workers)})


async def settled(ask: Callable[[], T | Awaitable[T]]) -> T:
    """The router's answer. Made beside the loop where it runs in this process: of a thousand workers it takes long."""
    told = await asyncio.to_thread(ask)
    return await told if isinstance(told, Awaitable) else told
