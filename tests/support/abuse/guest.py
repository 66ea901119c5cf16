"""An honest decode worker's first contact, made again and again: what strangers at the doors must not prevent."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np
from support.abuse.insider import geometry_of, identity_of, worker
from support.abuse.pair import KEYS, Pair

from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.wire.errors import PeerLost, PlaneRefused
from disagg.transceiver.wire.links import ControlClient
from disagg.transceiver.wire.messages.peer import Hello, Welcome
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.node import draw_id
from disagg.worker.plane_classes import landing_planes

NUM_SLOTS = 4
CONTACT_TIMEOUT_S = 10.0  # a plane's own handshake has 5 s


@dataclass
class Guests:
    """`num_met`: first contacts, by plane, that opened it."""

    num_met: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.num_met}, {len(self.faults)} turned away, longest {self.longest_s:.2f} s"


async def guests(pair: Pair, planes: tuple[str, ...], done: asyncio.Event, *, every_s: float = 0.5) -> Guests:
    """Until `done`, and at least once: say HELLO to the prefill worker, open each plane that it offers, and leave."""
    seen = Guests()
    facts = await asyncio.to_thread(
        lambda: (worker(pair, "prefill-0")["endpoint"], identity_of(pair), geometry_of(pair))
    )
    endpoint, identity, geometry = facts
    while True:
        await visit(endpoint, Hello(draw_id(), "guest", identity, geometry, planes), seen)
        if done.is_set():
            return seen
        await asyncio.sleep(every_s)


async def visit(endpoint: str, hello: Hello, seen: Guests) -> None:
    began_at = time.monotonic()
    try:
        async with asyncio.timeout(CONTACT_TIMEOUT_S):
            await _meet(endpoint, hello, seen)
    except (PeerLost, TimeoutError) as error:
        seen.faults.append(f"a guest was not welcomed: {error!r}")
    seen.longest_s = max(seen.longest_s, time.monotonic() - began_at)


async def _meet(endpoint: str, hello: Hello, seen: Guests) -> None:
    client = await ControlClient.connect(endpoint, KEYS)
    try:
        await client.ready()
        await client.send(hello)
        while not isinstance(welcome := await client.recv(), Welcome):
            pass
        for offer in welcome.planes:
            await _open(hello, offer, seen)
    finally:
        await client.close()


async def _open(hello: Hello, offer: PlaneOffer, seen: Guests) -> None:
    pools = [
        PoolRegion(np.zeros((NUM_SLOTS, nbytes), np.uint8), np.zeros(NUM_SLOTS, np.uint64), -1, 0)
        for nbytes in dict.fromkeys(hello.geometry.slot_nbytes)  # one pool for each size of slot, in the groups' order
    ]
    plane = landing_planes([offer.plane], keys=KEYS)[offer.plane]()
    try:
        await plane.connect(hello.incarnation, offer, pools)
        seen.num_met[offer.plane] = seen.num_met.get(offer.plane, 0) + 1
    except (PeerLost, PlaneRefused) as error:
        seen.faults.append(f"a guest was turned away at the {offer.plane} plane: {error}")
    finally:
        await plane.close()
