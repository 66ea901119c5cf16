"""Another worker, as the router names it."""

from __future__ import annotations

from dataclasses import dataclass

from disagg.transceiver.wire.messages.ranges import MAX_ADDRESS_CHARS, check_id, check_size
from disagg.transceiver.wire.messages.values import Geometry


@dataclass(frozen=True, slots=True)
class PeerTarget:
    """The other end of a transfer, or a source that a sink should connect to ahead of any request.

    `geometry`: the peer's; None = as the reader's. Both ends plan in the units that it makes.
    """

    incarnation: str
    worker_id: str
    endpoint: str
    geometry: Geometry | None = None

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        check_id("worker_id", self.worker_id)
        check_size("endpoint", self.endpoint, MAX_ADDRESS_CHARS)
