"""Request bodies, read under a cap each, a cap on all together, and a deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import ClientDisconnect, Request

from disagg.api.http.errors import ApiError

BODY_TIMEOUT_S: Final = 30.0  # a client that takes longer for a few MiB is stalled or hostile
MAX_HELD_NBYTES: Final = 256 * 1024 * 1024  # of bodies being read or waiting for a helper: 32 of the largest
PART_NBYTES: Final = 32 * 1024  # a part is at least so large, so that there are few


class Bodies:
    """Bodies that are in memory now. A request's is given back when it has been made a prompt."""

    def __init__(self, max_nbytes: int, max_held_nbytes: int = MAX_HELD_NBYTES) -> None:
        self._max_nbytes = max_nbytes
        self._max_held_nbytes = max_held_nbytes
        self.num_held_nbytes = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[list[bytes]]:
        """The body in parts, counted while the block runs.

        Raises ApiError 408 (too slow), 413 (too large) or 503 (too many at once).
        """
        parts: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    await self._read(request, parts)
            except TimeoutError:
                raise ApiError(408, f"the request body did not arrive within {BODY_TIMEOUT_S:g} s") from None
            yield parts
        finally:
            self.num_held_nbytes -= sum(map(len, parts))

    async def _read(self, request: Request, parts: list[bytes]) -> None:
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self._max_nbytes:
            raise too_large(f"{declared} bytes", self._max_nbytes)
        nbytes = 0
        try:
            async for part in request.stream():
                nbytes += len(part)
                if nbytes > self._max_nbytes:
                    raise too_large("larger", self._max_nbytes)
                if self.num_held_nbytes + len(part) > self._max_held_nbytes:
                    raise ApiError(503, "the server is reading as many large requests as it may", retry_after_s=5)
                if parts and len(parts[-1]) < PART_NBYTES:  # a body may come byte by byte
                    parts[-1] += part
                else:
                    parts.append(part)
                self.num_held_nbytes += len(part)
        except ClientDisconnect:
            raise ApiError(400, "the client left before its request was complete") from None


def too_large(size: str, max_nbytes: int) -> ApiError:
    return ApiError(413, f"the request body is {size}; at most {max_nbytes} bytes are accepted")
