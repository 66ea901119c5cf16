"""How large each message may be: bytes, and containers within it. Both are looked at before a field is.

Reading costs by what is built: a byte of the wire can be an empty array of its own, which takes fifty times as long as
a byte of text. So each kind of message has a bound of its own on both, by the longest that a deployment sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from disagg.transceiver.wire.messages import peer, router
from disagg.transceiver.wire.messages.peer import MAX_UNTOLD
from disagg.transceiver.wire.messages.ranges import (
    MAX_GROUPS,
    MAX_LEASED,
    MAX_LINKS,
    MAX_NAMED_TRANSFERS,
    MAX_NAMED_UNITS,
    MAX_RUNS,
    MAX_SAMPLES,
    MAX_SLICE_RUNS,
    MAX_UNITS,
)
from disagg.transceiver.wire.messages.values import MAX_COUNTED, MAX_TOP

MAX_MESSAGE_NBYTES: Final = 16 << 20
"""Of any kind, which the sockets enforce: DISPATCH of nearly 2**22 token ids of 4 bytes, four times the longest context
of a published model."""

MAX_MANIFEST_ENTRIES: Final = MAX_UNITS
"""More units than one DONE can name are not fetched in one transfer."""

ENTRY_NBYTES: Final = 12
"""Of a manifest's unit: its ordinal and its digest."""

MAX_FIELDS: Final = 256
"""Of one record: those of today have at most 16; later minor versions may add some."""

ITEMS_PER_CONTAINER: Final = 8
"""On average: records and pairs have 2 to 16 items. Beside them a message has the slots and generations of its units,
as plain numbers."""


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """`num_containers`: arrays and maps, each of them once, at any depth."""

    nbytes: int
    num_containers: int

    @property
    def num_items(self) -> int:
        return ITEMS_PER_CONTAINER * self.num_containers + 2 * MAX_UNITS


class Contents:
    """Told of each array and map as it is complete; raises `ValueError` at one too many."""

    def __init__(self, limit: SizeLimit) -> None:
        self.containers = limit.num_containers
        self.items = limit.num_items

    def add(self, container: Any) -> Any:
        self.containers -= 1
        self.items -= len(container)
        if self.containers < 0 or self.items < 0:
            raise ValueError("too many arrays, maps or items")
        return container


CONTROL: Final = SizeLimit(1 << 20, 1 << 15)
"""What has no long list: registrations, reports, the tokens of one step."""

_UNIT_NAMES: Final = SizeLimit(512 << 10, MAX_NAMED_UNITS + 64)
"""Units by name, in at most 24 bytes each, and a reason."""

_LARGE: Final = {
    # Scales of 126 layers of 128 heads, the most of any published model, as floats; three containers a layer.
    peer.Hello: SizeLimit(384 << 10, 1 << 12),
    peer.Welcome: SizeLimit(384 << 10, 1 << 12),
    # Runs of at most 11 bytes, required ones and held ones.
    peer.Fetch: SizeLimit(64 << 10, 2 * (MAX_RUNS + 4 * MAX_GROUPS)),
    # 14 bytes a unit with its slot and generation; three containers a run.
    peer.Slice: SizeLimit(128 << 10, 4 * MAX_SLICE_RUNS),
    # 64 bytes a group beside its columns; the rest is a first token with its logprobs and the counts of what came.
    peer.Done: SizeLimit(ENTRY_NBYTES * MAX_UNITS + (128 << 10), 4 * MAX_GROUPS + MAX_TOP + MAX_COUNTED),
    peer.Heartbeat: SizeLimit(640 << 10, MAX_NAMED_TRANSFERS + 64),
    peer.Failed: _UNIT_NAMES,
    peer.Cancel: _UNIT_NAMES,
    router.TransferFailure: _UNIT_NAMES,
    # A prompt is one string of bytes: the longest has few containers beside it.
    router.Dispatch: SizeLimit(MAX_MESSAGE_NBYTES, 1 << 15),
    # What a router may lack of an answer, each token with the most likely ones.
    peer.Accepted: SizeLimit(1 << 20, MAX_UNTOLD * (MAX_TOP + 4)),
    router.Grant: SizeLimit(MAX_MESSAGE_NBYTES, 1 << 12),
    # Many peers by name and address, or one with its geometry and the scales of its layers.
    router.Peers: SizeLimit(448 << 10, 1 << 12),
    # Text that links give as their reasons; a sample has five containers.
    router.Lease: SizeLimit(1 << 20, MAX_LEASED + MAX_LINKS + 5 * MAX_SAMPLES + 16),
    router.Pulse: SizeLimit(512 << 10, MAX_LEASED + 16),
    # With one geometry, as HELLO.
    router.Register: SizeLimit(448 << 10, 1 << 12),
    router.Retarget: SizeLimit(448 << 10, 1 << 12),
    router.TransferReport: SizeLimit(512 << 10, 4 * MAX_GROUPS),
}


def limit_of(kind: type) -> SizeLimit:
    return _LARGE.get(kind, CONTROL)
