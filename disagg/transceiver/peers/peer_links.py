"""The links of a decode worker: those that the router introduced, and those that a request was the first to need.

Introduced links are kept. The others are bounded: where there is no room the idle one that was used longest ago gives
way, and while none is idle a peer waits for the first that becomes so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from typing import Any, Final

from disagg.transceiver.peers.link import PeerLink
from disagg.transceiver.wire.messages.router import PeerTarget

MAX_ON_USE: Final = 64
"""Links that requests opened, idle ones included. Each has some ten descriptors, of 1,024 that a process may have by
default, and four heartbeats a second. A worker that admits 256 sequences, each waiting well under a second for its KV,
seldom hears from so many peers at once."""

LOOK_AGAIN_S: Final = 0.05
"""Where every link serves a transfer: a tenth of what the shortest of them takes to fail, and no load for a loop."""

Then = Callable[[], None]


class PeerLinks:
    """By the peer's incarnation. Belongs to one event loop."""

    def __init__(
        self,
        make: Callable[[PeerTarget], PeerLink],
        begin: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        busy: Callable[[], Collection[str]],
    ) -> None:
        """`begin` starts a task; `busy` names the peers with transfers, whose links must stay."""
        self._make, self._begin, self._busy = make, begin, busy
        self._links: dict[str, tuple[PeerLink, asyncio.Task[None]]] = {}
        """Those that requests opened in the order of their last use."""
        self._introduced: set[str] = set()
        self._wanted: dict[str, PeerTarget] = {}
        """Peers for whose links there is no room yet."""
        self._waiting: dict[str, list[Then]] = {}
        """What is done once a link is settled."""
        self._closing: dict[str, asyncio.Task[None]] = {}
        self._later: asyncio.TimerHandle | None = None
        self._is_ended = False

    def __iter__(self) -> Iterator[PeerLink]:
        return (link for link, _ in self._links.values())

    def get(self, peer: str) -> PeerLink | None:
        found = self._links.get(peer)
        return found[0] if found is not None else None

    def introduce(self, targets: Iterable[PeerTarget]) -> None:
        """Connect to exactly these ahead of any request; links that requests opened stay as they are."""
        introduced = {target.incarnation: target for target in targets}
        for incarnation in self._introduced - introduced.keys():
            self.forget(incarnation)
        self._introduced = set(introduced)
        for incarnation in introduced.keys() - self._links.keys():
            self._open(introduced[incarnation])

    def reach(self, target: PeerTarget, then: Then | None = None) -> None:
        """Connect, unless there is a link, and do `then` once it is ready, lost or refused: at once where it is."""
        peer = target.incarnation
        if peer in self._links:
            self._links[peer] = self._links.pop(peer)
        elif not self._is_ended:
            self._wanted.setdefault(peer, target)
            self._open_wanted()
        if then is not None:
            self._waiting.setdefault(peer, []).append(then)
            if not self._is_unsettled(peer):
                self.settle(peer)

    def _open_wanted(self) -> None:
        """As far as there is room; what is left is looked at again soon, since transfers end in many ways."""
        while self._wanted and (self._num_on_use < MAX_ON_USE or self._close_idle()):
            self._open(self._wanted.pop(next(iter(self._wanted))))
        if self._wanted and self._later is None:
            self._later = asyncio.get_running_loop().call_later(LOOK_AGAIN_S, self._look_again)

    def _look_again(self) -> None:
        self._later = None
        self._open_wanted()

    def settle(self, peer: str) -> None:
        """The link is ready, lost or refused, or there will be none: do what waited for it."""
        for then in self._waiting.pop(peer, ()):
            then()

    def forget(self, peer: str) -> None:
        """The peer is gone for good; an unknown one is no error."""
        self._wanted.pop(peer, None)
        self._introduced.discard(peer)
        if peer in self._links:
            self._close(peer)
        self.settle(peer)

    def end(self) -> None:
        """Open no more, and say to every link that the cancellation which follows is meant for good."""
        self._is_ended = True
        self._wanted.clear()
        for link in self:
            link.end()

    @property
    def _num_on_use(self) -> int:
        return len(self._links) - len(self._introduced & self._links.keys())

    def _is_unsettled(self, peer: str) -> bool:
        link = self.get(peer)
        return peer in self._wanted or (link is not None and link.is_connecting)

    def _close_idle(self) -> bool:
        """Close the link that was used longest ago and serves no transfer. False when all of them do."""
        busy = {*self._busy(), *self._waiting, *self._introduced}
        idle = next((peer for peer in self._links if peer not in busy), None)
        if idle is not None:
            self._close(idle)
        return idle is not None

    def _open(self, target: PeerTarget) -> None:
        peer, link = target.incarnation, self._make(target)
        self._links[peer] = link, self._begin(_run_after(self._closing.get(peer), link))

    def _close(self, peer: str) -> None:
        """The task goes on until plane and connection are closed; no other link to this peer runs before that."""
        link, task = self._links.pop(peer)
        link.end()
        task.cancel()
        self._closing[peer] = task
        task.add_done_callback(lambda task: self._closed(peer, task))

    def _closed(self, peer: str, task: asyncio.Task[None]) -> None:
        if self._closing.get(peer) is task:
            del self._closing[peer]


async def _run_after(closing: asyncio.Task[None] | None, link: PeerLink) -> None:
    if closing is not None:
        await asyncio.wait({closing})
    await link.run()
