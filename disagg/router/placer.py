"""What one request asks of the router: a ticket, and which workers could serve it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from disagg.router.choose import Placement, Unplaceable
from disagg.router.pairing import KvFormat
from disagg.transceiver.wire.messages.router import PeerTarget

Mint = Callable[[int, str, str, float, Sequence[int]], bytes]
"""(epoch, prefill incarnation, decode incarnation, ttl_s, tokens that the client has) -> ticket"""

MintLeg = Callable[[str, int, str, str, int, float], bytes]
"""(leg, epoch, source, sink, tokens of the answer that the router has, ttl_s) -> ticket of a move"""


class Placer(Protocol):
    """Which workers could serve now; `disagg.router.choose.Fleet` answers."""

    def place(self, max_tokens: int, exclude: frozenset[str] = frozenset()) -> Placement | Unplaceable: ...

    def alone(self, exclude: frozenset[str]) -> Placement | Unplaceable: ...

    def unfit(self, kv: KvFormat | None) -> frozenset[str]: ...

    def prefill_for(self, decode: str, exclude: frozenset[str]) -> PeerTarget | None: ...
