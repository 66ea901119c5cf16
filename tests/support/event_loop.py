"""Runs an async test in a loop of its own, with a deadline, and fails it when it leaves a task behind."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

DEADLINE_S = 60.0  # a hang should fail with its own traceback, before pytest's timeout

PATIENCE_S = 20.0  # of one step of a test: a hang is told from a machine that is busy, not a slow one from a fast one


def in_event_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(_supervised(test(*args, **kwargs)))

    return run


async def within(awaitable: Awaitable[T], seconds: float = PATIENCE_S) -> T:
    """The result, or `TimeoutError`: what loopback does takes milliseconds."""
    async with asyncio.timeout(seconds):
        return await awaitable


async def until(is_true: Callable[[], object], what: str = "", patience_s: float = PATIENCE_S) -> None:
    """Poll: nothing raises an event for what tests look at. `AssertionError` when it does not become true."""
    deadline = time.monotonic() + patience_s
    while not is_true():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.001)


async def _supervised(test: Coroutine[Any, Any, None]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await test
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"
