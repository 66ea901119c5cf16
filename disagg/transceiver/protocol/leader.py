"""The one decision of a decode worker of several ranks: it may decode when every part has been verified.

A part is one (decode rank, prefill rank). Each is a transfer of its own, with its own MAC, and is acknowledged by the
rank that verified it; only the leader, rank 0, makes the licence to decode, and only once. The first failure decides
too: what the other ranks still receive is for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from disagg.transceiver.protocol.actions import FreeReservation, PartVerified, ReportFailed, Verified
from disagg.transceiver.wire.errors import LocalProtocolError
from disagg.transceiver.wire.messages.values import AttemptKey, FirstToken

Pair = tuple[int, int]
"""(decode rank, prefill rank)"""


def part_key(key: AttemptKey, pair: Pair) -> AttemptKey:
    """The name under which a pair of ranks does its part: tickets and MACs of one part are good for no other."""
    name = f"{key.transfer_id}:{pair[0]}:{pair[1]}".encode()
    return AttemptKey(blake2b(name, digest_size=16, person=b"disagg-ranks").hexdigest(), key.epoch)


Outcome = Verified | ReportFailed | FreeReservation


class Leader:
    """One attempt of one request. Pure."""

    def __init__(self, key: AttemptKey, parts: Iterable[Pair]) -> None:
        self._key = key
        self._missing = set(parts)
        self._first_token: FirstToken | None = None
        self.decision: Outcome | None = None
        assert self._missing, "a transfer has at least the leaders' part"

    def verified(self, pair: Pair, part: PartVerified) -> Verified | None:
        """`pair` is done. The licence, from the last one. Raises `LocalProtocolError` for a pair that owes nothing."""
        if self.decision is not None:
            return None
        if pair not in self._missing:
            raise LocalProtocolError(f"decode rank {pair[0]} has no open part from prefill rank {pair[1]}")
        self._missing.discard(pair)
        self._first_token = self._first_token or part.first_token
        if self._missing:
            return None
        if self._first_token is None:
            raise LocalProtocolError("no part came from the prefill worker's rank 0")
        self.decision = Verified(self._key.transfer_id, self._key.epoch, self._first_token)
        return self.decision

    def ended(self, outcome: ReportFailed | FreeReservation) -> bool:
        """Some pair ended without being verified. Whether that decided it: the others are to be stopped."""
        if self.decision is not None:
            return False
        self.decision = outcome
        return True
