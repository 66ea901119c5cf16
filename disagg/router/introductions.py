"""Which sinks hear of which sources ahead of any request: of all while the fleet is small, else none.

Every sink linked to every source is quadratic in the fleet. Past a size, or where an operator says so,
a worker connects to a peer when a request names it for the first time; the router then takes a pair without a
link for one that can be linked. A fleet that has been so large stays so: its pairs are not all linked any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, Literal

from disagg.router.pairing import traits_difference
from disagg.router.registry import Registry, Worker
from disagg.transceiver.wire.messages.router import Lease, Peers, PeerTarget
from disagg.transceiver.wire.purposes import HANDOFF, shared

Connect = Literal["auto", "eager", "lazy"]

EAGER_WORKERS: Final = 64
"""With `auto`: 32 by 32 workers have 1,024 links, and each worker sends and reads 130 heartbeats a second, a hundredth
of a core. Twice as many workers have four times the links."""

MAX_EAGER_WORKERS: Final = 256
"""Even where an operator says eager: a lease names 384 links, and a link that no lease names is none."""

MAX_ACQUAINTED: Final = 16
"""Workers of a fleet in which all that may fetch from one another are linked ahead of any request: 240 links, each with
a thread's worth of sockets and a measurement at first contact. Beyond, those for prefixes and moves are made when one
is named."""

PEERS_PER_MESSAGE: Final = 128
"""Of the reader's own geometry, so that reading them takes a fraction of the 5 ms that one handler has."""

Told = Iterator[tuple[Worker, Peers]]


class Introductions:
    """What workers are told when the registry changes. Pure: nothing here sends."""

    def __init__(self, registry: Registry, connect: Connect) -> None:
        self._registry = registry
        self._most = {"auto": EAGER_WORKERS, "eager": MAX_EAGER_WORKERS, "lazy": 0}[connect]

    def of_new(self, worker: Worker) -> Told:
        """PEERS for each worker that has something to hear of this one, or it of them."""
        if len(self._registry) > self._most:
            self._registry.link_on_use()
        if self._registry.is_linked_on_use:
            return
        sources = [_target_for(worker, other) for other in self._registry if self._meet(other, worker)]
        yield from ((worker, peers) for peers in _messages(sources))
        for other in self._registry:
            if self._meet(worker, other):
                yield other, Peers((_target_for(other, worker),))

    def of_lost(self, source: Worker) -> Told:
        """To those that have a link to it, or may be making one."""
        for other in self._registry:
            is_told = not self._registry.is_linked_on_use and self._meet(source, other)
            if is_told or source.incarnation in other.link_reports:
                yield other, Peers((), (source.incarnation,))

    def _meet(self, source: Worker, sink: Worker) -> bool:
        """For handoffs as far as links are made ahead at all, for other purposes in small fleets."""
        if source is sink or traits_difference(source.traits, sink.traits) is not None:
            return False
        purposes = shared(source.sends, sink.receives)
        return HANDOFF in purposes or (bool(purposes) and len(self._registry) <= MAX_ACQUAINTED)

    def of_links(self, lease: Lease) -> Peers | None:
        """What to answer a lease that names links to workers which are none any more.

        A link that a request opened may be younger than the loss of its peer, which was told to others only.
        """
        gone = tuple(link.incarnation for link in lease.links or () if self._registry.get(link.incarnation) is None)
        return Peers((), gone) if gone else None


def _target_for(reader: Worker, worker: Worker) -> PeerTarget:
    """`worker` as `reader` is told of it: without its geometry, which is most of it, where that is the reader's."""
    is_alike = reader.traits.geometry is worker.traits.geometry or reader.traits.geometry == worker.traits.geometry
    return replace(worker.target, geometry=None) if is_alike else worker.target


def _messages(targets: list[PeerTarget]) -> Iterator[Peers]:
    """Geometries are long, with thousands of scales: one to a message."""
    alike = [target for target in targets if target.geometry is None]
    for first in range(0, len(alike), PEERS_PER_MESSAGE):
        yield Peers(tuple(alike[first : first + PEERS_PER_MESSAGE]))
    yield from (Peers((target,)) for target in targets if target.geometry is not None)
