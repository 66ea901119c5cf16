"""A deadline for what mostly need not wait: a timer is made only for work that did not end in its first step."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any


async def within(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    """Await `work` as a part of this task. Raises TimeoutError when it takes longer."""
    try:
        waits_for = work.send(None)
    except StopIteration:
        return
    async with asyncio.timeout(seconds):
        await _Begun(work, waits_for)


class _Begun:
    """The rest of a coroutine that has begun, and waits for a future."""

    def __init__(self, work: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._work, self._waits_for = work, waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        while True:
            thrown: BaseException | None = None
            try:
                yield self._waits_for
            except BaseException as exc:  # a cancellation too, which belongs where the work waits
                thrown = exc
            try:
                self._waits_for = self._work.send(None) if thrown is None else self._work.throw(thrown)
            except StopIteration:
                return
