"""How each peer cuts this worker's slots into units, one answer per geometry."""

from __future__ import annotations

from collections.abc import Sequence

from disagg.transceiver.layout.units import peer_unit
from disagg.transceiver.memory.kept_digests import KeptDigests
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.memory.slot_units import SlotUnits
from disagg.transceiver.wire.messages.values import Geometry


class PeerCuts:
    """Our slots as the units that are hashed for peers, by the peers' geometry. It outlives them, as do its counts."""

    def __init__(self, geometry: Geometry, regions: Sequence[PoolRegion]) -> None:
        self._geometry, self._regions = geometry, tuple(regions)
        self._num_slots = [len(region.slots) for region in regions]
        self._kept = KeptDigests(self._num_slots)
        self._cuts: dict[Geometry, tuple[SlotUnits, KeptDigests]] = {}

    @property
    def kept(self) -> KeptDigests:
        """Of whole slots."""
        return self._kept

    def of_peer(self, peer: Geometry) -> tuple[SlotUnits | None, KeptDigests]:
        """How our slots are cut for it, None where a unit is a slot, and what is kept of such units' digests."""
        if peer == self._geometry:
            return None, self._kept
        if peer not in self._cuts:
            cut = SlotUnits(self._geometry, self._regions, peer_unit(self._geometry, peer.block_size), peer)
            self._cuts[peer] = cut, KeptDigests(self._num_slots, cut.per_slot)
        return self._cuts[peer]

    @property
    def num_saturated(self) -> int:
        """Numbers that were hashed, to be sent, as the largest of a peer's format."""
        return sum(cut.num_saturated for cut, _ in self._cuts.values())
