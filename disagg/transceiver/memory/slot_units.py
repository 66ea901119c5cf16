"""Slots seen as the units of a peer of another geometry: names, bytes and places of parts of a slot.

Between equal geometries a unit is a slot and nothing here is used. Else the unit on the wire, in FETCH, SLICE and DONE,
has the finer block size, the layers and heads that both ranks hold, and the narrower number format; only where memory
is touched does it become a part of a slot again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from disagg.transceiver.layout.cut import Rectangle, unit_nbytes
from disagg.transceiver.layout.ranks import rank_layout, rectangles
from disagg.transceiver.layout.runs import Ints, ints
from disagg.transceiver.layout.slice_size import units_per_slice
from disagg.transceiver.layout.strides import Layout
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.convert import wire_dtype
from disagg.transceiver.memory.copying import check_generations
from disagg.transceiver.memory.foreign_pools import ForeignPools, pool_numbers
from disagg.transceiver.memory.gather import Area, Buffer, Packer, Unpacker
from disagg.transceiver.memory.regions import Bytes, Destination, PoolRegion
from disagg.transceiver.wire.messages.values import Geometry, UnitName


@dataclass(frozen=True, slots=True)
class Packed:
    """The canonical bytes of one slice in staging: what a plane sends in place of slots. One region per group."""

    units: tuple[SourceUnit, ...]
    regions: tuple[PoolRegion, ...]

    def pairs(self, sources: Sequence[SourceUnit]) -> Iterator[tuple[SourceUnit, Bytes]]:
        """(unit, its bytes) in order; `sources` are the units that were packed."""
        for source, unit in zip(sources, self.units, strict=True):
            yield source, self.regions[unit.pool].slots[unit.slot]


class SlotUnits:
    """The slots of one geometry, cut into units of `unit` tokens.

    `regions` lie in this process, maybe read-only, or are a foreign engine's tensors.
    """

    def __init__(
        self,
        geometry: Geometry,
        regions: Sequence[PoolRegion],
        unit: int,
        peer: Geometry | None = None,
        *,
        is_sender: bool = True,
    ) -> None:
        """`peer`: the other end's geometry, if only the block size is its own then None; `is_sender`: this end sends.

        A sender's cut is for `gather` and `pack`, a receiver's for `scatter` and `reread`.
        """
        assert geometry.block_size % unit == 0
        peer = peer or geometry
        self.unit = unit
        self.per_slot = geometry.block_size // unit
        self.rectangles = rectangles(geometry, peer) if is_sender else rectangles(peer, geometry)
        self.pool_of_group = pool_numbers(geometry, regions)
        ends = (geometry.kv_dtype, peer.kv_dtype)
        self.wire_dtype = wire_dtype(*(ends if is_sender else reversed(ends)))
        self._regions = tuple(regions)
        layout, buffers = _memory(geometry, regions)
        self._packers: dict[int, Packer] = {}
        self._unpackers: dict[int, Unpacker] = {}
        self.unit_nbytes = tuple(
            unit_nbytes(group, rectangle, unit, self.wire_dtype) if rectangle else 0
            for group, rectangle in zip(geometry.groups, self.rectangles, strict=True)
        )
        for number, (group, rectangle) in enumerate(zip(geometry.groups, self.rectangles, strict=True)):
            if rectangle is None:
                continue
            area = Area(layout, buffers, number, group, rectangle, unit)
            scales = _scales(peer, number, rectangle)
            if is_sender:
                self._packers[number] = Packer(area, peer.kv_dtype, scales)
            else:
                self._unpackers[number] = Unpacker(area, peer.kv_dtype, scales)

    @property
    def can_reread(self) -> bool:
        """Whether what landed can be hashed from where it lies: a conversion that rounds keeps no byte of the wire."""
        return all(unpacker.can_reread for unpacker in self._unpackers.values())

    @property
    def num_saturated(self) -> int:
        """Numbers that a conversion made here stored as the largest of their format."""
        ends: list[Packer | Unpacker] = [*self._packers.values(), *self._unpackers.values()]
        return sum(end.num_saturated for end in ends)

    def split(self, units: Sequence[SourceUnit]) -> tuple[SourceUnit, ...]:
        """Slots of this side by their units, in order."""
        return tuple(
            replace(unit, ordinal=unit.ordinal * self.per_slot + part)
            for unit in units
            for part in range(self.per_slot)
        )

    def slices(self, units: Sequence[SourceUnit]) -> Iterator[Sequence[SourceUnit]]:
        """`units` in parts of about a slice, so that packing them takes bounded memory."""
        count = units_per_slice(self.unit_nbytes)
        for first in range(0, len(units), count):
            yield units[first : first + count]

    def blocks(self, names: Sequence[UnitName]) -> tuple[UnitName, ...]:
        """The slots of this side that these units are part of, each once."""
        return tuple(dict.fromkeys(UnitName(name.group, name.ordinal // self.per_slot) for name in names))

    def gather(self, group: int, ordinals: Ints, slots: Ints) -> Bytes:
        """Canonical bytes of units that lie in these slots, `[n, unit_nbytes]`, copied."""
        rows: Bytes = self._packers[group].gather(slots, self._tokens(ordinals)).numpy()
        return rows

    def scatter(self, group: int, ordinals: Ints, slots: Ints, rows: Bytes) -> int:
        """The reverse of `gather`, at the other end; returns how many numbers saturated."""
        return self._unpackers[group].scatter(torch.from_numpy(rows), slots, self._tokens(ordinals))

    def reread(self, group: int, ordinals: Ints, slots: Ints) -> Bytes:
        """The wire's bytes of units as they now lie here. Only where `can_reread`."""
        rows: Bytes = self._unpackers[group].reread(slots, self._tokens(ordinals)).numpy()
        return rows

    def pack(self, units: Sequence[SourceUnit]) -> Packed:
        """Gather a slice into staging of its own. Raises `SourceChanged` when a slot was given away meanwhile."""
        pools, slots = ints([u.pool for u in units]), ints([u.slot for u in units])
        planned, ordinals = ints([u.generation for u in units]), ints([u.ordinal for u in units])
        regions: list[PoolRegion] = []
        moved: list[SourceUnit] = []
        check_generations(self._regions, pools, slots, planned)
        for start, stop in by_group(units):
            rows = self.gather(units[start].group, ordinals[start:stop], slots[start:stop])
            moved += [SourceUnit(u.group, u.ordinal, len(regions), i, 0) for i, u in enumerate(units[start:stop])]
            regions.append(PoolRegion(rows, np.zeros(len(rows), dtype=np.uint64), -1, 0))
        check_generations(self._regions, pools, slots, planned)
        return Packed(tuple(moved), tuple(regions))

    def _tokens(self, ordinals: Ints) -> Ints:
        return ordinals % self.per_slot * self.unit


def by_group(units: Sequence[SourceUnit] | Sequence[Destination]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of `units` within which the group stays."""
    start = 0
    for stop in range(1, len(units) + 1):
        if stop == len(units) or units[stop].group != units[start].group:
            yield start, stop
            start = stop


def _memory(geometry: Geometry, regions: Sequence[PoolRegion]) -> tuple[Layout, Sequence[Buffer]]:
    if isinstance(regions, ForeignPools):
        return regions.layout, regions.buffers
    layout = rank_layout(geometry, [len(region.slots) for region in regions])
    return layout, [region.slots.reshape(-1) for region in regions]


def _scales(geometry: Geometry, number: int, rectangle: Rectangle) -> torch.Tensor | None:
    """The model-wide scales of a rectangle as `Area.scales` has them."""
    if not geometry.kv_scales or not geometry.kv_scales[number]:
        return None
    first_layer, num_layers, first_head, num_heads = rectangle
    every = torch.tensor(geometry.kv_scales[number], dtype=torch.float32)[..., None, None]
    return every[first_layer : first_layer + num_layers, :, first_head : first_head + num_heads]
