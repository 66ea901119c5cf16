"""A process that runs out of descriptors: it keeps one link to a prefill worker, which is in it too, and wants another.

argv: a plane, and how many descriptors are left, one try for each. Prints one JSON object: of each try what the new
link says of itself, whether the old one is still ready, and whether a new one is when there is room again.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from typing import Any

from support.links import sending_side
from support.links.pools import make_pool
from support.links.sending_side import IDENTITY, Prefill
from support.links.transfer_pair import GEOMETRY, KEYS

from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.link import PeerLink
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.node import Node, draw_id
from disagg.transceiver.wire.sockets import Sockets
from disagg.worker.plane_classes import landing_planes, source_planes

LIMIT = 256
TRY_S = 7.0
"""Longer than what a link waits for any one answer."""


def a_pool() -> tuple[PoolRegion, ...]:
    pool = make_pool(4, 4096, seed=1)
    pool.generations[:] = 0  # of reserved slots, which the first contact moves
    return (pool,)


class Files:
    """Takes every descriptor of this process but `room`."""

    def __init__(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, hard))
        self._taken: list[int] = []

    def leave(self, room: int) -> None:
        try:
            while True:
                self._taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self.give(room)

    def give(self, count: int) -> None:
        for fd in self._taken[:count]:
            os.close(fd)
        del self._taken[:count]

    def give_all(self) -> None:
        self.give(len(self._taken))


class Links:
    def __init__(self, prefill: Prefill, plane: str, sockets: Sockets) -> None:
        self._target = PeerTarget(prefill.node.incarnation, "prefill", prefill.server.endpoint)
        self._plane, self._sockets, self._pools = plane, sockets, a_pool()
        self._running: dict[PeerLink, asyncio.Task[None]] = {}

    def start(self) -> PeerLink:
        node = Node(draw_id(), "decode", IDENTITY, GEOMETRY, KEYS)
        planes = landing_planes([self._plane], keys=KEYS, sockets=self._sockets)
        link = PeerLink(node, self._target, planes, self._pools, _nothing, _lost, lambda peer: (), self._sockets)
        self._running[link] = asyncio.create_task(link.run())
        return link

    async def end(self, link: PeerLink) -> None:
        link.end()
        task = self._running.pop(link)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def end_all(self) -> None:
        for link in tuple(self._running):
            await self.end(link)


async def told(link: PeerLink, *states: str, wait_s: float) -> str:
    """Its state when that is one of these, or after so long."""
    until = asyncio.get_running_loop().time() + wait_s
    while link.report().state not in states and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110 - no event
        await asyncio.sleep(0.02)
    return link.report().state


async def main(plane: str, rooms: list[int]) -> None:
    sockets, files = Sockets(KEYS), Files()
    offered = source_planes([plane], host="127.0.0.1", advertised_host="127.0.0.1", keys=KEYS, sockets=sockets)
    async with Prefill.running(offered) as prefill:
        links = Links(prefill, plane, sockets)
        old, tries = links.start(), list[dict[str, Any]]()
        assert await told(old, "ready", wait_s=30) == "ready", old.report()
        for room in rooms:
            files.leave(room)
            new = links.start()
            state = await told(new, "ready", "lost", wait_s=TRY_S)
            tries.append({"room": room, "state": state, "detail": new.report().detail, "old": old.report().state})
            files.give_all()
            await links.end(new)
        last = links.start()
        back = await told(last, "ready", wait_s=20)
        print(json.dumps({"tries": tries, "old": old.report().state, "back": back}), flush=True)
        await links.end_all()
    sockets.close()


def _nothing(*_: object) -> None:
    return None


async def _lost(peer: str, reason: str) -> None:
    return None


if __name__ == "__main__":
    sending_side.pools = a_pool
    asyncio.run(main(sys.argv[1], [int(room) for room in sys.argv[2:]]))
