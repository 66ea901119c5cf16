"""The outermost layer: request ids on every response, the API key, and errors as OpenAI error objects."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, Final, cast

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from disagg.api.http.authorization import KeyRing
from disagg.api.http.errors import ApiError, shutting_down
from disagg.api.http.responses import error_response

HEADER: Final = "x-request-id"
MAX_ID_LENGTH: Final = 128  # it is logged on every line and crosses the wire with each attempt
MAX_DRAINED_NBYTES: Final = 256 * 1024  # of a refused body: read faster than a new connection is made
OPEN_PATHS: Final = frozenset({"/health", "/ready", "/version", "/metrics"})  # what probes and scrapers read

NO_KEYS: Final[Mapping[str, str]] = MappingProxyType({})

log: Final = logging.getLogger(__name__)


def request_id_of(scope: Scope) -> str:
    return cast("str", scope["state"]["request_id"])


def tenant_of(scope: Scope) -> str:
    """Whose API key the request carries; "" where the API is open."""
    return cast("str", scope["state"]["tenant"])


class Edge:
    """ASGI middleware. Whatever happens below it, the client gets one whole response with its `X-Request-Id`."""

    def __init__(self, app: ASGIApp, api_keys: Mapping[str, str] = NO_KEYS) -> None:
        """`api_keys`: tenants by key; none of them leaves every path open."""
        self._app = app
        self._keys = KeyRing(api_keys) if api_keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = _Body(scope, receive)
        receive = body.receive
        response = _Response(send, uuid.uuid4().hex, body)
        scope.setdefault("state", {}).update(request_id=response.request_id, tenant="")
        try:
            self._admit(scope, response)
            await self._app(scope, receive, response.send)
        except ApiError as exc:
            await error_response(exc)(scope, receive, response.send)
        except asyncio.CancelledError:  # only the server cancels at this height, when it ends with requests running
            if not response.has_started:
                await error_response(shutting_down())(scope, receive, response.send)
        except Exception:
            log.exception("request `%s`: an error of our own", response.request_id)
            await self._apologise(scope, receive, response)

    def _admit(self, scope: Scope, response: _Response) -> None:
        """Take the client's request id and check its key. Raises ApiError 400 or 401."""
        headers = Headers(scope=scope)
        if (given := headers.get(HEADER)) is not None:
            response.request_id = scope["state"]["request_id"] = check_request_id(given)
        if self._keys is None or scope["path"] in OPEN_PATHS:
            return
        if (tenant := self._keys.tenant_of(headers.get("authorization", ""))) is None:
            raise ApiError(401, "the API key is missing or wrong: send the header `Authorization: Bearer KEY`")
        scope["state"]["tenant"] = tenant

    async def _apologise(self, scope: Scope, receive: Receive, response: _Response) -> None:
        if response.has_started:  # its bytes are out: leaving it unfinished makes the server cut the connection
            return
        message = f"the server failed; its log says why under request id `{response.request_id}`"
        await error_response(ApiError(500, message))(scope, receive, response.send)


class _Body:
    """Watches a request's body arrive."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        self._receive = receive
        self._num_left = int(length) if length.isdecimal() else float("inf" if "transfer-encoding" in headers else 0)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_left = self._num_left - len(message.get("body", b"")) if message.get("more_body") else 0
        return message

    @property
    def is_worth_reading(self) -> bool:
        """Whether the connection is better kept, at the price of reading the rest of this body for nothing."""
        return self._num_left <= MAX_DRAINED_NBYTES


class _Response:
    """Watches a response start, and puts the request's id on it."""

    def __init__(self, send: Send, request_id: str, body: _Body) -> None:
        self._send = send
        self._body = body
        self.request_id = request_id
        self.has_started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            _add_header(message, HEADER, self.request_id)
            if not self._body.is_worth_reading:
                _add_header(message, "connection", "close")
        await self._send(message)


def _add_header(message: MutableMapping[str, Any], name: str, value: str) -> None:
    message["headers"] = [*message.get("headers", ()), (name.encode(), value.encode())]


def check_request_id(given: str) -> str:
    """The client's id, if logs and headers can hold it. Raises ApiError 400."""
    if not 1 <= len(given) <= MAX_ID_LENGTH or not (given.isascii() and given.isprintable()):
        message = f"`X-Request-Id`: expected 1 to {MAX_ID_LENGTH} printable ASCII characters"
        raise ApiError(400, message, param="X-Request-Id")
    return given


async def http_exception(request: Request, exc: Exception) -> Response:
    """Routing's own refusals (404, 405) as error objects."""
    assert isinstance(exc, HTTPException)
    reasons = {404: "there is no `{path}` here", 405: "`{path}` does not answer {method}"}
    reason = reasons.get(exc.status_code, exc.detail).format(path=request.url.path, method=request.method)
    response = error_response(ApiError(exc.status_code, reason))
    response.headers.update(exc.headers or {})
    return response
