"""What messages of peers raised here: it costs the peer its connection, is counted, and logged by the peer's name."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

from disagg.transceiver.wire.errors import TransceiverError, clipped

log = logging.getLogger(__name__)

MAX_NAMES: Final = 1024
"""Peers give themselves their names: of more than a router's workers the counts per name begin anew."""


class PeerFaults:
    """Counts of one process. Use it from one event loop."""

    def __init__(self) -> None:
        self.count = 0
        self._by_peer: Counter[str] = Counter()

    def blame(self, peer: str, message: object, error: Exception) -> None:
        """`message` of `peer` raised `error`. One that is no error of the protocol is logged with its traceback."""
        peer = clipped(peer)
        self.count += 1
        if len(self._by_peer) == MAX_NAMES:
            self._by_peer.clear()
        self._by_peer[peer] += 1
        count = self._by_peer[peer]
        if count & (count - 1) == 0:  # log 1, 2, 4, 8...: a flood cannot fill the disk
            what, kind = type(message).__name__, type(error).__name__
            told = None if isinstance(error, TransceiverError) else error
            log.error("a %s of %s cannot be taken (%d so far): %s: %s", what, peer, count, kind, error, exc_info=told)
