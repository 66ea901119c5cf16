"""Who may serve together: the first field in which two workers differ, named with both values."""

from __future__ import annotations

from dataclasses import dataclass

from disagg.transceiver.layout.pairing import differing_field, geometry_difference
from disagg.transceiver.wire.messages.router import Register
from disagg.transceiver.wire.messages.values import Identity


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


def pair_difference(prefill: Register, decode: Register) -> Difference | None:
    """Why KV of `prefill` cannot land at `decode`: a field of their geometry, or `planes` when none is shared."""
    if found := geometry_difference(prefill.geometry, decode.geometry):
        return Difference(*found)
    if not set(prefill.planes) & set(decode.planes):
        return Difference("planes", ", ".join(prefill.planes), ", ".join(decode.planes))
    return None
