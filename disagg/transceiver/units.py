"""Slots seen as the finer units of a peer whose block size differs: names, bytes and places of parts of a slot.

Between equal geometries a unit is a slot and nothing here is used. Else the finer block size is the unit on the wire,
in FETCH, SLICE and DONE; only where memory is touched does a unit become a part of a slot again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from disagg.transceiver.errors import RemoteProtocolError
from disagg.transceiver.messages.values import Geometry, GroupSemantics, UnitName
from disagg.transceiver.outbox import SLICE_NBYTES
from disagg.transceiver.packed import Area
from disagg.transceiver.planes.base import Bytes, Destination, PoolRegion, SourceUnit
from disagg.transceiver.planes.copying import Ints, check_generations, ints
from disagg.transceiver.reshape import unit_nbytes, unit_size
from disagg.transceiver.strides import own_layout


@dataclass(frozen=True, slots=True)
class _Group:
    """A layer group as `own_layout` wants it."""

    num_kv_heads: int
    head_dim: int
    dtype: str
    layers: tuple[int, ...]


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
    """The slots of one geometry, cut into units of `unit` tokens. `regions` lie in this process, maybe read-only."""

    def __init__(self, geometry: Geometry, regions: Sequence[PoolRegion], unit: int) -> None:
        assert geometry.block_size % unit == 0
        self.unit = unit
        self.per_slot = geometry.block_size // unit
        self._regions = tuple(regions)
        groups = geometry.groups
        self.unit_nbytes = tuple(unit_nbytes(g, _whole(g), unit, geometry.kv_dtype) for g in groups)
        self.pool_of_group = tuple(geometry.slot_nbytes.index(self.per_slot * nbytes) for nbytes in self.unit_nbytes)
        layout = own_layout(
            [_Group(g.num_kv_heads, g.head_dim, geometry.kv_dtype, g.layers) for g in groups],
            self.pool_of_group,
            [len(region.slots) for region in regions],
            geometry.block_size,
        )
        buffers = [region.slots.reshape(-1) for region in regions]
        self._areas = [Area(layout, buffers, n, g, _whole(g), unit) for n, g in enumerate(groups)]

    def split(self, units: Sequence[SourceUnit]) -> tuple[SourceUnit, ...]:
        """Slots of this side by their units, in order."""
        return tuple(
            replace(unit, ordinal=unit.ordinal * self.per_slot + part)
            for unit in units
            for part in range(self.per_slot)
        )

    def slices(self, units: Sequence[SourceUnit]) -> Iterator[Sequence[SourceUnit]]:
        """`units` in parts of about a slice, so that packing them takes bounded memory."""
        count = max(1, SLICE_NBYTES // max(self.unit_nbytes))
        for first in range(0, len(units), count):
            yield units[first : first + count]

    def blocks(self, names: Sequence[UnitName]) -> tuple[UnitName, ...]:
        """The slots of this side that these units are part of, each once."""
        return tuple(dict.fromkeys(UnitName(name.group, name.ordinal // self.per_slot) for name in names))

    def gather(self, group: int, ordinals: Ints, slots: Ints) -> Bytes:
        """Canonical bytes of units that lie in these slots, `[n, unit_nbytes]`, copied."""
        values = self._areas[group].read(slots, self._tokens(ordinals))
        rows: Bytes = values.reshape(-1).view(torch.uint8).numpy()  # numpy knows no bfloat16
        return rows.reshape(len(slots), self.unit_nbytes[group])

    def scatter(self, group: int, ordinals: Ints, slots: Ints, rows: Bytes) -> None:
        """The reverse of `gather`."""
        self._areas[group].put(slots, self._tokens(ordinals), rows)

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


def geometry_by_units(geometry: Geometry, unit: int) -> Geometry:
    """What the cores plan by: `geometry` as if its blocks were the units."""
    per_slot = geometry.block_size // unit
    return replace(geometry, block_size=unit, slot_nbytes=tuple(n // per_slot for n in geometry.slot_nbytes))


def peer_unit(geometry: Geometry, peer_block_size: int) -> int:
    """Tokens per unit with a peer; 0 stands for our own block size. Raises `RemoteProtocolError`: they must divide."""
    try:
        return unit_size(geometry.block_size, peer_block_size or geometry.block_size)
    except ValueError as exc:
        raise RemoteProtocolError(str(exc)) from exc


def _whole(group: GroupSemantics) -> tuple[int, int, int, int]:
    return 0, len(group.layers), 0, group.num_kv_heads
