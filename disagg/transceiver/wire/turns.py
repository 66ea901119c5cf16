"""How long a task may go on while there is work: what is ready costs no turn of the loop, and holds up nothing.

A task that awaits what is there already goes on at once, for as many messages as have come. Each may be small and all
of them long: so a task's turn is bounded by time, not by a count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, TypeVar

TURN_S: Final = 0.002
"""With its last message, of at most 3 ms, a handler stays within 5 ms; a pass over an idle loop takes 50 us."""

T = TypeVar("T")


class TaskTurn:
    """One task's, on one loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends_at = clock() + TURN_S

    @property
    def is_over(self) -> bool:
        return self._clock() >= self._ends_at

    def begin(self) -> None:
        """To be called when the task waited for something."""
        self._ends_at = self._clock() + TURN_S

    async def yield_if_over(self) -> None:
        """Let the loop do what else is ready, if this task has had its turn."""
        if self.is_over:
            await asyncio.sleep(0)
            self.begin()


class TurnQueue(asyncio.Queue[T]):
    """A queue with one reader, whose turns end however much there is to read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._turn = TaskTurn(clock)

    async def get(self) -> T:
        """The next item. Cancel-safe: nothing is taken before the last wait is over."""
        if self.empty():
            item = await super().get()
            self._turn.begin()
            return item
        await self._turn.yield_if_over()
        return self.get_nowait()
