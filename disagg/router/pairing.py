"""Which workers may serve together: the first field in which two workers differ, named with both values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from disagg.transceiver.layout.compatibility import differing_field, geometry_difference
from disagg.transceiver.wire.messages.router import Register
from disagg.transceiver.wire.messages.values import Geometry, Identity

MAX_KINDS_COMPARED: Final = 4096
"""Pairs of kinds of workers whose comparison is remembered: a fleet has a handful, one release beside another."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`ours` belongs to the side that was there first: the router or its workers, or the prefill worker of a pair."""

    field: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.field} ({self.ours} and {self.theirs})"


def record_difference(ours: Identity, theirs: Identity) -> Difference | None:
    """The first field that two records of one type do not share; None when they are equal."""
    found = differing_field(ours, theirs)
    return None if found is None else Difference(*found)


KvFormat = tuple[str, object]
"""What decides how a stored number is rounded: KV dtype and scales."""


def kv_format(geometry: Geometry) -> KvFormat:
    return geometry.kv_dtype, geometry.kv_scales


class PairTraits:
    """What decides which peers a worker may have. Its hash is computed once: a geometry has thousands of numbers."""

    __slots__ = ("_hash", "geometry", "planes")

    def __init__(self, register: Register) -> None:
        self.geometry: Geometry = register.geometry
        self.planes = register.planes
        self._hash = hash((self.geometry, self.planes))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, PairTraits) and (self.geometry, self.planes) == (other.geometry, other.planes)


def pair_difference(prefill: Register, decode: Register) -> Difference | None:
    """Why KV of `prefill` cannot land at `decode`: a field of their geometry, or `planes` when none is shared."""
    return traits_difference(PairTraits(prefill), PairTraits(decode))


@lru_cache(maxsize=MAX_KINDS_COMPARED)
def traits_difference(prefill: PairTraits, decode: PairTraits) -> Difference | None:
    """As `pair_difference`, once per pair of kinds and not per pair of workers."""
    if found := geometry_difference(prefill.geometry, decode.geometry):
        return Difference(*found)
    if not set(prefill.planes) & set(decode.planes):
        return Difference("planes", ", ".join(prefill.planes), ", ".join(decode.planes))
    return None
