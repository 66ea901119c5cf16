"""JSON on the wire: bodies read under a cap and a deadline, answers encoded so that any text survives."""

from __future__ import annotations

import asyncio
import json
import uuid
from http import HTTPStatus
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from disagg.api.errors import ApiError, bad_request

BODY_TIMEOUT_S: Final = 30.0  # a client that takes longer for a few MiB is stalled or hostile
INLINE_NBYTES: Final = 64 * 1024  # parsing this much JSON takes about a millisecond; more goes to a thread


def encode_json(value: Any) -> bytes:
    """UTF-8 JSON. A lone surrogate, which UTF-8 cannot hold, leaves as its `\\udXXX` escape, which is JSON."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)


def raw_response(error: ApiError) -> bytes:
    """The error as bytes of HTTP/1.1, for where no application answers. The connection ends with it."""
    body = encode_json(error.body)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
    headers |= error.headers | {"X-Request-Id": uuid.uuid4().hex}
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def read_json(request: Request, max_nbytes: int) -> Any:
    """The parsed body. Raises ApiError 400 (not JSON), 408 (too slow) or 413 (too large)."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await _read_body(request, max_nbytes)
    except TimeoutError:
        raise ApiError(408, f"the request body did not arrive within {BODY_TIMEOUT_S:g} s") from None
    if len(body) > INLINE_NBYTES:
        return await asyncio.to_thread(_parse, body)
    return _parse(body)


async def _read_body(request: Request, max_nbytes: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_nbytes:
        raise too_large(f"{declared} bytes", max_nbytes)
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > max_nbytes:
                raise too_large("larger", max_nbytes)
    except ClientDisconnect:
        raise ApiError(400, "the client left before its request was complete") from None
    return bytes(body)


def too_large(size: str, max_nbytes: int) -> ApiError:
    return ApiError(413, f"the request body is {size}; at most {max_nbytes} bytes are accepted")


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except RecursionError:
        raise bad_request("the request body is not usable JSON: it is nested too deeply") from None
    except ValueError as exc:  # also UnicodeDecodeError, and integers of more digits than Python converts
        raise bad_request(f"the request body is not valid JSON: {exc}") from exc
