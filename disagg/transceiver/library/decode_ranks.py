"""A decode worker of several ranks: a receiving side for each, and a leader over their parts.

Each rank has its own incarnation, pools and links; it fetches from every prefill rank that owns what it needs, and from
the prefill leader, whose DONE carries the first token. The ranks of this class share a process and a loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from disagg.transceiver.layout.ranks import Part, senders_of
from disagg.transceiver.layout.required import runs_of
from disagg.transceiver.layout.units import geometry_by_units, peer_unit
from disagg.transceiver.memory.foreign_pools import pool_numbers
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.decode_side import ReceivingSide, TransferRecord
from disagg.transceiver.peers.landing_threads import LandingThreads
from disagg.transceiver.planes.base import LandingPlane
from disagg.transceiver.protocol.actions import FreeReservation, PartVerified, ReportFailed, Verified
from disagg.transceiver.protocol.events import CancelAsked, Reserved
from disagg.transceiver.protocol.leader import Leader, Outcome, Pair, part_key
from disagg.transceiver.protocol.receiver import Order, Receiver
from disagg.transceiver.protocol.transfer import Ends
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.messages.values import AttemptKey, Geometry, GroupRuns
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.sockets import Sockets

Destinations = Sequence[Sequence[tuple[int, int]]]
"""Of one rank, per group: (ordinal of a unit, slot) pairs."""

OnDecision = Callable[[AttemptKey, Outcome, Mapping[Pair, TransferRecord]], None]
"""Called once per attempt, when no job of any rank holds a slot of it any more."""


@dataclass(frozen=True, slots=True)
class DecodeRank:
    """One rank: its node and its pools."""

    node: Node
    pools: Sequence[PoolRegion]


@dataclass(slots=True)
class _Attempt:
    leader: Leader
    open: set[Pair]
    records: dict[Pair, TransferRecord] = field(default_factory=dict)


class DecodeRanks:
    """Fetches into all ranks of one decode worker from all ranks of one prefill worker. Use it from one loop."""

    def __init__(
        self,
        ranks: Sequence[DecodeRank],
        senders: Sequence[PeerTarget],
        planes: Mapping[str, Callable[[], LandingPlane]],
        sockets: Sockets,
        on_decision: OnDecision,
    ) -> None:
        """`senders`: the prefill worker's ranks in order, each with its geometry. `planes`: what a link may use."""
        self._ranks, self._senders, self._on_decision = tuple(ranks), tuple(senders), on_decision
        self._attempts: dict[AttemptKey, _Attempt] = {}
        self._parts: dict[AttemptKey, tuple[AttemptKey, Pair]] = {}
        self._landing = [
            LandingThreads(r.pools, [r.node.geometry.kv_dtype] * len(r.node.geometry.groups)) for r in self._ranks
        ]
        self._sides = [
            ReceivingSide(
                rank.node,
                planes,
                rank.pools,
                pool_numbers(rank.node.geometry, rank.pools),
                landing,
                sockets,
                self,
                self._part_ended,
            )
            for rank, landing in zip(self._ranks, self._landing, strict=True)
        ]
        geometries = [_geometry(target) for target in self._senders]
        self.pairs: tuple[Pair, ...] = tuple(
            (number, sender)
            for number, rank in enumerate(self._ranks)
            for sender in senders_of(rank.node.geometry, geometries)
        )
        """(decode rank, prefill rank) of every FETCH that a transfer makes."""

    @property
    def is_ready(self) -> bool:
        """Is every pair linked?"""
        return all(self._sides[rank].is_ready(self._senders[sender].incarnation) for rank, sender in self.pairs)

    def details(self) -> tuple[str, ...]:
        """What the links that are not ready say."""
        return tuple(link.detail for side in self._sides for link in side.reports() if link.state != "ready")

    async def run(self) -> None:
        """Link every pair and serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for number, side in enumerate(self._sides):
                    tasks.create_task(side.run())
                    await asyncio.sleep(0)  # `run` makes the group in which links live
                    side.set_peers([self._senders[sender] for rank, sender in self.pairs if rank == number])
        finally:
            for landing in self._landing:
                await landing.close()

    def start(
        self,
        key: AttemptKey,
        prompt_len: int,
        destinations: Sequence[Destinations],
        tickets: Mapping[Pair, bytes],
        *,
        deadline_s: float,
    ) -> None:
        """Fetch into `destinations[rank]`: the units that this rank lacks. `tickets`: one for each of `pairs`."""
        self._attempts[key] = _Attempt(Leader(key, self.pairs), set(self.pairs))
        self._parts |= {part_key(key, pair): (key, pair) for pair in self.pairs}
        for pair in self.pairs:
            self._fetch(key, pair, prompt_len, destinations[pair[0]], tickets[pair], deadline_s)

    def _fetch(
        self, key: AttemptKey, pair: Pair, prompt_len: int, wanted: Destinations, ticket: bytes, deadline_s: float
    ) -> None:
        node, side, sender = self._ranks[pair[0]].node, self._sides[pair[0]], self._senders[pair[1]]
        theirs, own = _geometry(sender), part_key(key, pair)
        part = Part.between(theirs, node.geometry)
        slots = [some if rectangle else () for some, rectangle in zip(wanted, part.rectangles, strict=True)]
        transfer = Receiver(
            Ends(own.transfer_id, own.epoch, node.incarnation, sender.incarnation),
            Order(
                ticket=ticket,
                plane=side.plane_of(sender.incarnation),
                geometry=geometry_by_units(node.geometry, peer_unit(node.geometry, theirs.block_size)),
                keys=node.keys,
                deadline_s=deadline_s,
                part=part,
            ),
            time.monotonic(),
        )
        side.start(own, transfer, sender.incarnation, slots, Reserved(_required(slots), prompt_len))

    def cancel(self, key: AttemptKey, reason: str) -> None:
        """End an attempt; `on_decision` says when nothing of it is held."""
        for pair in self.pairs:
            self._sides[pair[0]].feed(part_key(key, pair), CancelAsked(reason))

    # --- what the sides report --------------------------------------------------------------------------------

    def decode(self, key: AttemptKey, verified: Verified, record: TransferRecord) -> None:
        """Never called: a rank gives no licence."""
        raise AssertionError("a rank gave the licence that is its leader's")

    def transfer_failed(self, key: AttemptKey, failure: ReportFailed, record: TransferRecord) -> None:
        self._part_ended(key, failure, record)

    def free_reservation(self, key: AttemptKey, reason: str, record: TransferRecord) -> None:
        self._part_ended(key, FreeReservation(reason), record)

    def _part_ended(
        self, own: AttemptKey, outcome: PartVerified | ReportFailed | FreeReservation, record: TransferRecord
    ) -> None:
        key, pair = self._parts.pop(own)
        attempt = self._attempts[key]
        attempt.records[pair] = record
        attempt.open.discard(pair)
        if isinstance(outcome, PartVerified):
            attempt.leader.verified(pair, outcome)
        elif attempt.leader.ended(outcome):
            self.cancel(key, outcome.reason)
        if not attempt.open and self._attempts.pop(key, None) is not None:  # the cancel above may have ended it
            assert attempt.leader.decision is not None, "every part has ended"
            self._on_decision(key, attempt.leader.decision, attempt.records)


def _geometry(target: PeerTarget) -> Geometry:
    assert target.geometry is not None, "a rank says how it is cut"
    return target.geometry


def _required(slots: Destinations) -> tuple[GroupRuns, ...]:
    return tuple(
        GroupRuns(group, runs_of(np.array([ordinal for ordinal, _ in pairs], dtype=np.int64)))
        for group, pairs in enumerate(slots)
    )
