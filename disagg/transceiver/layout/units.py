"""The unit of a transfer: its size between two geometries, where one lies at its source, and what it hashes to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from disagg.transceiver.layout.cut import unit_size
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.values import Geometry


@dataclass(frozen=True, slots=True)
class SourceUnit:
    """A unit that later steps will not change: group, ordinal, and its slot of a pool in one generation."""

    group: int
    ordinal: int
    pool: int
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class HashedUnit(SourceUnit):
    """One whose bytes there have this xxh3-64 digest."""

    digest: int


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
