"""Errors as the OpenAI API states them: `{"error": {message, type, param, code}}` with a true status."""

from __future__ import annotations

import math
from typing import Any, Final

from disagg.router.generation import GenerationError

# type and code of a status, in OpenAI's words where it has some; clients branch on them.
KINDS: Final = {
    400: ("invalid_request_error", "invalid_request"),
    401: ("authentication_error", "invalid_api_key"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    431: ("invalid_request_error", "request_header_fields_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    502: ("server_error", "bad_gateway"),
    503: ("service_unavailable_error", "service_unavailable"),
    504: ("server_error", "timeout"),
}
NO_WORKERS_RETRY_S: Final = 1.0  # workers register within a second once they run


class ApiError(Exception):
    """A request answered with an error. `param` names the field at fault; `code` overrides the status's own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind, code = KINDS.get(self.status, KINDS[500] if self.status >= 500 else KINDS[400])
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code or code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after_s))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def bad_request(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def no_workers() -> ApiError:
    return ApiError(
        503,
        "no workers are ready to serve this model: start a prefill and a decode worker, or wait for them",
        retry_after_s=NO_WORKERS_RETRY_S,
    )


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", retry_after_s=NO_WORKERS_RETRY_S)


def from_generation(error: GenerationError) -> ApiError:
    """The router's refusal, with Retry-After on every 503 so that clients know that it is worth trying again."""
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.status == 503:
        retry_after_s = NO_WORKERS_RETRY_S
    return ApiError(error.status, error.message, retry_after_s=retry_after_s)
