"""How a thread of a plane ends a wait on the loop."""

from __future__ import annotations

import asyncio


def end_wait(here: asyncio.Future[None], error: Exception | None) -> None:
    """On the loop. The caller may be gone by now, or have heard of the connection's end."""
    if here.done():
        return
    if error is None:
        here.set_result(None)
    else:
        here.set_exception(error)
