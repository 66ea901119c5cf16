"""A prefill worker of several ranks: a sending side for each, over its own pools.

Every rank serves the decode ranks that need something of it; rank 0 serves all, for its DONE carries the first token.
The ranks of this class share a process and a loop; what they send was computed before.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.units import SourceUnit, geometry_by_units, peer_unit
from disagg.transceiver.memory.foreign_pools import moves_slots
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.memory.slot_units import SlotUnits
from disagg.transceiver.peers.landing_threads import LandingThreads
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.protocol.events import Pinned, PromptComputed, UnitsFinal
from disagg.transceiver.protocol.leader import Pair, part_key
from disagg.transceiver.protocol.sender import Offer, Sender
from disagg.transceiver.protocol.transfer import Ends
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.values import AttemptKey, FirstToken, Geometry, UnitName
from disagg.transceiver.wire.node import Node

_COMPUTED = 1  # the one computation of a prompt that is finished


@dataclass(frozen=True, slots=True)
class PrefillRank:
    """One rank: its node, its pools, where peers reach it, and its started planes."""

    node: Node
    pools: Sequence[PoolRegion]
    server: ControlServer
    planes: Mapping[str, SourcePlane]


@dataclass(frozen=True, slots=True)
class DecodePeer:
    """A decode rank as a prefill worker knows it."""

    incarnation: str
    geometry: Geometry


class PrefillRanks:
    """Serves finished prompts of all ranks of one prefill worker to all ranks of one decode worker."""

    def __init__(self, ranks: Sequence[PrefillRank], on_released: Callable[[AttemptKey], None]) -> None:
        """`on_released`: a part, named by `part_key`, needs its sources no more."""
        self._ranks, self._on_released = tuple(ranks), on_released
        self._landing = [LandingThreads(rank.pools, ()) for rank in self._ranks]
        self._sides = [SendingSide(rank.node, rank.server, rank.planes, self, rank.pools) for rank in self._ranks]

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for side in self._sides:
                    tasks.create_task(side.run())
        finally:
            for landing in self._landing:
                await landing.close()

    async def serve(
        self,
        key: AttemptKey,
        prompt: tuple[int, ...],
        first_token: FirstToken,
        peers: Sequence[DecodePeer],
        pairs: Sequence[Pair],
        sources: Sequence[Sequence[SourceUnit]],
        *,
        deadline_s: float,
    ) -> None:
        """Offer a prompt to `pairs` (decode rank, prefill rank). `sources[rank]`: its blocks, by group and ordinal."""
        for pair in pairs:
            rank, side, peer = self._ranks[pair[1]], self._sides[pair[1]], peers[pair[0]]
            ours, own = rank.node.geometry, part_key(key, pair)
            unit = peer_unit(ours, peer.geometry.block_size)
            part, cut = Part.between(ours, peer.geometry), SlotUnits(ours, rank.pools, unit, peer.geometry)
            sent = [source for source in sources[pair[1]] if part.rectangles[source.group]]
            transfer = Sender(
                Ends(own.transfer_id, own.epoch, rank.node.incarnation, peer.incarnation),
                Offer(
                    prompt=prompt,
                    geometry=geometry_by_units(ours, unit),
                    unit_nbytes=cut.unit_nbytes,
                    planes={name: plane.sends_bytes for name, plane in rank.planes.items()},
                    keys=rank.node.keys,
                    ttl_s=deadline_s,
                    part=part,
                ),
                time.monotonic(),
            )
            units = await self._landing[pair[1]].digest_units(
                sent, None if moves_slots(ours, peer.geometry, rank.pools) else cut
            )
            side.start(own, transfer)
            side.feed(own, UnitsFinal(_COMPUTED, units))
            side.feed(own, PromptComputed(_COMPUTED, first_token))

    # --- what the sides ask -----------------------------------------------------------------------------------

    def pin(self, key: AttemptKey) -> None:
        for side in self._sides:
            if key in side:
                side.feed(key, Pinned(_COMPUTED))

    def release_source(self, key: AttemptKey, reason: str) -> None:
        self._on_released(key)

    def unregister(self, key: AttemptKey, units: Sequence[UnitName]) -> None:
        """Nothing of a finished prompt is registered for reuse here."""
