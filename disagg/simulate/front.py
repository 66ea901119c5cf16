"""The process in front of the workers: what it spends on requests and tokens, one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from disagg.simulate.cores import Cores


class FrontEnd:
    """Router, API and client as one process, which does its work in order."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._is_busy = False
        self.busy_s = 0.0

    def do(self, work_s: float, call: Callable[[], None]) -> None:
        """`call` when this and all work before it is done; at once where there is none."""
        if not work_s and not self._is_busy:
            call()
            return
        self._queue.append((work_s, call))
        if not self._is_busy:
            self._next()

    def _next(self) -> None:
        self._is_busy = True
        work_s, call = self._queue[0]
        self.busy_s += work_s
        self._cores.start(work_s, lambda: self._end(call))

    def _end(self, call: Callable[[], None]) -> None:
        self._queue.popleft()
        self._is_busy = False
        call()
        if self._queue and not self._is_busy:
            self._next()
