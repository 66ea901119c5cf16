"""How large each message may be: bytes, and containers within it. Both are looked at before a field is.

Reading costs by what is built: a byte of the wire can be an empty array of its own, which takes fifty times as long as
a byte of text. So each kind of message has a bound of its own on both, by the longest that a deployment sends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from disagg.transceiver.wire.messages import peer, router

MAX_MESSAGE_NBYTES: Final = 16 << 20
"""The largest legal message is DONE of 2**20 tokens, the longest context of a published model: at 16 tokens per block
and two layer groups 131072 manifest entries of at most 75 bytes, 9.4 MiB. DISPATCH of the same prompt has 2**20 token
ids of 4 bytes, 4 MiB. 16 MiB holds both with room for later fields."""

MAX_MANIFEST_ENTRIES: Final = (MAX_MESSAGE_NBYTES - (64 << 10)) // 75
"""More units than one DONE can name are not fetched in one transfer: 222 822. An entry has at most 75 bytes; 64 KiB are
for the rest, a first token with its logprobs."""

MAX_FIELDS: Final = 256
"""Of one record: those of today have at most 16; later minor versions may add some."""


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """`num_containers`: arrays and maps, each of them once, at any depth."""

    nbytes: int
    num_containers: int


@dataclass(slots=True)
class ContainerCount:
    """Told of each array and map as it is complete; raises `ValueError` at one too many."""

    most: int
    num: int = 0

    def __call__(self, container: Any) -> Any:
        self.num += 1
        if self.num > self.most:
            raise ValueError(f"more than {self.most} arrays and maps")
        return container


CONTROL: Final = SizeLimit(1 << 20, 1 << 15)
"""What has no long list: registrations, leases with thousands of samples and requests, the tokens of one step."""

_UNIT_NAMES: Final = SizeLimit(6 << 20, MAX_MANIFEST_ENTRIES + 64)
"""Every unit of the largest transfer by name, in at most 24 bytes each, and a reason."""

_LARGE: Final = {
    # Runs of at most 11 bytes: 47,000 of them. Blocks are fetched in one or two runs per group, more where some failed.
    peer.Fetch: SizeLimit(512 << 10, 1 << 16),
    # Three containers a run and 14 bytes a unit with its slot and generation: every second one of 2**17 units.
    peer.Slice: SizeLimit(4 << 20, (3 << 16) + 64),
    # Two containers an entry; the rest is a first token with its logprobs.
    peer.Done: SizeLimit(MAX_MESSAGE_NBYTES, 2 * MAX_MANIFEST_ENTRIES + 4096),
    peer.Failed: _UNIT_NAMES,
    peer.Cancel: _UNIT_NAMES,
    router.TransferFailure: _UNIT_NAMES,
    # A prompt is one string of bytes: the longest has few containers beside it.
    router.Dispatch: SizeLimit(MAX_MESSAGE_NBYTES, 1 << 15),
    # Hundreds of workers, each with its geometry and the scales of its layers.
    router.Peers: SizeLimit(4 << 20, 1 << 17),
}


def limit_of(kind: type) -> SizeLimit:
    return _LARGE.get(kind, CONTROL)
