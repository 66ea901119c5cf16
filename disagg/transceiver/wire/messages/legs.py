"""Transfers of other purposes than a handoff: each is a leg with an id of its own, which names its request."""

from __future__ import annotations

from dataclasses import dataclass

from disagg.transceiver.wire.messages.ranges import (
    MAX_INT32,
    MAX_SECRET_NBYTES,
    check_attempt,
    check_duration,
    check_id,
    check_int,
    check_one_of,
    check_size,
)
from disagg.transceiver.wire.messages.targets import PeerTarget
from disagg.transceiver.wire.purposes import MOVE, PREFIX
from disagg.transceiver.wire.schema import PackedInts


@dataclass(frozen=True, slots=True)
class PrefixLeg:
    """A transfer that brings cached blocks of a prompt's first `boundary` tokens to the worker that computes it.

    It has an id of its own and the epoch of its request. `source` was sent a GRANT for it.
    """

    transfer_id: str
    source: PeerTarget
    boundary: int
    ticket: bytes

    def __post_init__(self) -> None:
        check_id("transfer_id", self.transfer_id)
        check_int("boundary", self.boundary, 1, MAX_INT32)
        check_size("ticket", self.ticket, MAX_SECRET_NBYTES)


@dataclass(frozen=True, slots=True)
class Grant:
    """Router -> source: `sink` may fetch this once. `transfer_id`: of this transfer; `request`: of the request.

    For `prefix`: cached blocks of `tokens`, which end at the boundary of the ticket, among requests of `salt`. The
    source names the blocks itself, so nothing else is ever served. `ttl_s`: as in the ticket, counted from receipt.
    For `move`: the answer of `request` that the source is decoding, of which the router has the first `num_tokens`.
    """

    transfer_id: str
    epoch: int
    request: str
    purpose: str
    sink: PeerTarget
    ttl_s: float
    tokens: PackedInts = ()
    salt: str = ""
    num_tokens: int = 0

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)
        check_id("request", self.request)
        check_int("num_tokens", self.num_tokens, 1 if self.purpose == MOVE else 0, MAX_INT32)
        check_one_of("purpose", self.purpose, (PREFIX, MOVE))
        check_duration("ttl_s", self.ttl_s)


@dataclass(frozen=True, slots=True)
class Resume:
    """Router -> source of a move: go on with the answer, whose tokens are of `epoch` from here on.

    The router hears nothing more of the epochs before it but this source's own, so no second worker can speak.
    """

    transfer_id: str
    epoch: int

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)
