"""What one request asks of the router: a ticket, and which workers could serve it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from disagg.router.choose import Placement, Unplaceable
from disagg.transceiver.wire.messages.router import PeerTarget

Mint = Callable[[int, str, str, float], bytes]
"""(epoch, prefill incarnation, decode incarnation, ttl_s) -> ticket"""


class Placer(Protocol):
    """Which workers could serve now; `disagg.router.choose.Fleet` answers."""

    def place(self, max_tokens: int, exclude: frozenset[str] = frozenset()) -> Placement | Unplaceable: ...

    def prefill_for(self, decode: str, exclude: frozenset[str]) -> PeerTarget | None: ...
