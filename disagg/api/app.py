"""The HTTP applications: the public API and the loopback administration."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Final

from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from disagg.api.generate import GenerateEndpoint
from disagg.api.helpers.pool import Helpers
from disagg.api.http.bodies import Bodies
from disagg.api.http.edge import NO_KEYS, Edge, http_exception
from disagg.api.request.fields import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE
from disagg.api.request.sampling import check_defaults
from disagg.api.settings import ApiSettings
from disagg.api.status import AdminRoutes, StatusRoutes
from disagg.api.text.tokenizer import ModelTokenizer
from disagg.api.tokenize import TokenizeRoutes
from disagg.router.generation import AdminBackend, Backend

NOTHING_POSTED: Final[Mapping[str, ASGIApp]] = MappingProxyType({})


def check_text(settings: ApiSettings) -> None:
    """Read what the API will read. Raises ModelRefused for an unusable tokenizer or defaults."""
    check_defaults(settings.defaults)
    ModelTokenizer.load(settings.model_folder)


@contextlib.asynccontextmanager
async def open_app(backend: Backend, settings: ApiSettings, *, is_warm: bool = False) -> AsyncIterator[ASGIApp]:
    """The public API over `backend`, with its helper processes: one from the start if `is_warm`.

    Reads the tokenizer. Raises ModelRefused for an unusable tokenizer or defaults.
    """
    check_defaults(settings.defaults)
    tokenizer = ModelTokenizer.load(settings.model_folder)
    helpers = Helpers(settings, tokenizer)
    try:
        if is_warm:
            await helpers.warm()
        yield _create_app(backend, settings, tokenizer, helpers)
    finally:
        await helpers.close()


def _create_app(backend: Backend, settings: ApiSettings, tokenizer: ModelTokenizer, helpers: Helpers) -> ASGIApp:
    bodies = Bodies(settings.max_body_nbytes)
    text = TokenizeRoutes(backend, bodies, helpers)
    status = StatusRoutes(backend, settings)
    endpoints: dict[str, ASGIApp] = {
        path: GenerateEndpoint(path, backend, settings, tokenizer, bodies, helpers) for path in (COMPLETIONS, CHAT)
    }
    routes: list[BaseRoute] = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
        Route(TOKENIZE, text.tokenize, methods=["POST"]),
        Route(DETOKENIZE, text.detokenize, methods=["POST"]),
        Route("/v1/models", status.models),
        Route("/v1/models/", status.models),  # what a client asks that joins a base URL and an empty name
        Route("/v1/models/{model:path}", status.model),
        Route("/health", status.health),
        Route("/ready", status.ready),
        Route("/version", status.version),
        Route("/metrics", status.metrics),
        Route("/workers", status.workers),
    ]
    return _application(routes, settings.api_keys, endpoints)


def create_admin_app(backend: AdminBackend) -> ASGIApp:
    """Administration. It has no key of its own: bind it to loopback."""
    admin = AdminRoutes(backend)
    return _application(
        [
            Route("/requests/{request_id:path}", admin.request),
            Route("/workers", admin.workers),
            Route("/workers/{worker_id:path}/drain", admin.drain, methods=["POST", "DELETE"]),
        ],
        NO_KEYS,
    )


def _application(
    routes: list[BaseRoute], api_keys: Mapping[str, str], posted: Mapping[str, ASGIApp] = NOTHING_POSTED
) -> ASGIApp:
    """`posted`: by path, what answers POST there without Starlette's layers, through which each event would go."""
    router = ExceptionMiddleware(Router(routes), handlers={HTTPException: http_exception})

    async def choose(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # so that what is not there is an exception, and not Starlette's own answer
        chosen = posted.get(scope["path"]) if scope["method"] == "POST" else None
        await (router if chosen is None else chosen)(scope, receive, send)

    return Edge(choose, api_keys)
