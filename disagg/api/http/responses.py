"""Responses of JSON: whole, in parts, and as raw bytes where no application answers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import Response, StreamingResponse

from disagg.api.http.errors import ApiError
from disagg.api.http.json_pieces import encode_json, paced

JSON = "application/json"


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encode_json(value), status, headers, media_type=JSON)


def parts_response(parts: Sequence[bytes]) -> Response:
    """A response of encoded JSON, sent part by part."""
    length = {"content-length": str(sum(map(len, parts)))}
    return StreamingResponse(paced(parts), headers=length, media_type=JSON)


def error_response(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)


def raw_response(error: ApiError) -> bytes:
    """The error as bytes of HTTP/1.1, for where no application answers. The connection ends with it."""
    body = encode_json(error.body)
    headers = {"Content-Type": JSON, "Content-Length": str(len(body)), "Connection": "close"}
    headers |= error.headers | {"X-Request-Id": uuid.uuid4().hex}
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
