"""`X-Request-Timeout`: how many seconds a client will wait for its answer."""

from __future__ import annotations

import math
from typing import Final

from starlette.datastructures import Headers
from starlette.types import Scope

from disagg.api.http.errors import bad_request

HEADER: Final = "x-request-timeout"
MAX_CHARS: Final = 32  # of a number: more say nothing
EXPECTED: Final = "`X-Request-Timeout`: expected seconds above 0, such as `30` or `2.5`"


def request_timeout_of(scope: Scope) -> float | None:
    """In seconds; None where the client leaves it to the server, whose own limit always holds. Raises ApiError 400."""
    given = Headers(scope=scope).get(HEADER)
    if given is None:
        return None
    try:
        seconds = float(given) if len(given) <= MAX_CHARS else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise bad_request(EXPECTED, "X-Request-Timeout")
    return seconds
