"""The HTTP applications: the public API and the loopback administration."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Route

from disagg.api.edge import Edge, http_exception
from disagg.api.fields import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE
from disagg.api.generate import GenerateEndpoint
from disagg.api.sampling import check_defaults
from disagg.api.settings import ApiSettings
from disagg.api.status import AdminRoutes, StatusRoutes
from disagg.api.tokenize import TokenizeRoutes
from disagg.api.tokenizer import ModelTokenizer
from disagg.router.generation import Backend


def create_app(backend: Backend, settings: ApiSettings) -> Starlette:
    """The public API over `backend`. Reads the tokenizer. Raises ModelRefused for an unusable tokenizer or defaults."""
    check_defaults(settings.defaults)
    tokenizer = ModelTokenizer.load(settings.model_folder)
    text = TokenizeRoutes(backend, settings, tokenizer)
    status = StatusRoutes(backend, settings)
    routes: list[BaseRoute] = [
        Route(path, GenerateEndpoint(path, backend, settings, tokenizer), methods=["POST"])
        for path in (COMPLETIONS, CHAT)
    ]
    routes += [
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
    return _application(routes, settings.api_key)


def create_admin_app(backend: Backend) -> Starlette:
    """Administration. It has no key of its own: bind it to loopback."""
    admin = AdminRoutes(backend)
    return _application([Route("/requests/{request_id:path}", admin.request), Route("/workers", admin.workers)], None)


def _application(routes: list[BaseRoute], api_key: str | None) -> Starlette:
    return Starlette(
        routes=routes,
        middleware=[Middleware(Edge, api_key=api_key)],
        exception_handlers={HTTPException: http_exception},
    )
