"""The end of a worker in good order: nothing new from the router, what is here goes elsewhere or finishes, then the
process ends.

    ask            the next lease says `draining`: the router places nothing more here
    nothing open   every answer and every transfer of this worker has ended, and the router was told
    over           the registration is left; after `timeout_s` too, or when asked twice

What is left then is lost like a dead worker's: requests without a token are tried elsewhere, answers end in an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from disagg.transceiver.wire.timing import HEARTBEAT_S

log = logging.getLogger(__name__)

LOOK_S: Final = 0.05
"""How often a draining worker looks whether it is done: an answer takes longer than that, and a look costs nothing."""


class Drain:
    """Made once per process. Use it from the event loop."""

    def __init__(self, timeout_s: float) -> None:
        self.asked = asyncio.Event()
        self.over = asyncio.Event()
        self._timeout_s = timeout_s
        self._num_open: Callable[[], int] | None = None

    def ask(self) -> None:
        """End soon; at once when asked before, or when this worker is not registered and so serves no request."""
        if self._num_open is None or self.asked.is_set():
            self.over.set()
            return
        self.asked.set()
        log.info("draining: %d requests to finish within %g s", self._num_open(), self._timeout_s)
        asyncio.get_running_loop().call_later(self._timeout_s, self._give_up)

    @contextlib.contextmanager
    def serving(self, num_open: Callable[[], int]) -> Iterator[None]:
        """While registered: `num_open` counts the requests that this worker has not done its part of."""
        self._num_open = num_open
        try:
            yield
        finally:
            self._num_open = None

    async def run(self, tell: Callable[[], None], flushed: Callable[[], Awaitable[None]]) -> None:
        """Part of a registration. `tell` the router, see the work end, wait for the last word to be `flushed`."""
        await self.asked.wait()
        tell()
        await asyncio.sleep(HEARTBEAT_S)  # what the router placed here before it heard is here by then
        while self._num_open is not None and self._num_open():  # noqa: ASYNC110 (spread over engine and transfers)
            await asyncio.sleep(LOOK_S)
        await flushed()
        log.info("drained")
        self.over.set()

    def _give_up(self) -> None:
        if self._num_open is not None and not self.over.is_set():
            log.warning("not drained after %g s: leaving %d requests behind", self._timeout_s, self._num_open())
        self.over.set()
