"""Answers for transfers that are over or were never known, so that a peer that repeats itself can stop."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Final

from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.messages.peer import (
    Ack,
    Cancel,
    Cancelled,
    Closed,
    Done,
    Failed,
    Fetch,
    Header,
    Received,
    TransferMessage,
)

CAPACITY: Final = 16384
"""A worker that ends 25 transfers a second keeps each for the ten minutes of the default deadline; about 10 MiB."""

EXPIRE_S: Final = 1.0
"""How often all are looked through: 2 ms where there are most, and what lives for minutes may live a second longer."""


@dataclass(frozen=True, slots=True)
class _Tombstone:
    peer: str
    last_word: TransferMessage | None
    until: float


class Tombstones:
    """Last words of closed transfers by (transfer, epoch). Bounded: the oldest go first, and time ends each."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._stones: OrderedDict[tuple[str, int], _Tombstone] = OrderedDict()
        self._look_at = 0.0

    def __len__(self) -> int:
        return len(self._stones)

    def add(self, key: tuple[str, int], peer: str, last_word: TransferMessage | None, until: float) -> None:
        """Keep `Transfer.last_word` of a transfer that said `Forget(until)`."""
        self._stones[key] = _Tombstone(peer, last_word, until)
        self._stones.move_to_end(key)
        if len(self._stones) > self._capacity:
            self._stones.popitem(last=False)

    def knows(self, key: tuple[str, int]) -> bool:
        """Was this transfer closed here and not yet forgotten? A FETCH or DISPATCH for it must not start it anew."""
        return key in self._stones

    def expire(self, now: float) -> None:
        """Forget what is past its time; at most `EXPIRE_S` late, so that this may be called at any rate."""
        if now < self._look_at:
            return
        self._look_at = now + EXPIRE_S
        for key in [key for key, stone in self._stones.items() if stone.until <= now]:
            del self._stones[key]

    def answer(self, message: TransferMessage, sequence: int) -> TransferMessage | None:
        """The answer to a late message of a transfer in here, or None when it wants none or comes from a stranger."""
        stone = self._stones.get((message.header.transfer_id, message.header.epoch))
        if stone is None or stone.peer != message.header.source:
            return None
        header = _answering(message.header, message.header.destination, sequence)
        asks_sender = isinstance(message, Fetch | Received) and isinstance(stone.last_word, Failed | Cancelled | Closed)
        asks_receiver = isinstance(message, Done | Failed | Cancelled) and isinstance(stone.last_word, Ack | Cancel)
        if stone.last_word is not None and (asks_sender or asks_receiver):
            return replace(stone.last_word, header=header)
        return Closed(header) if isinstance(message, Ack | Cancel | Received) else None


def answer_unknown(message: TransferMessage, me: str, sequence: int) -> TransferMessage | None:
    """The answer to a message of a transfer this process does not know, or None when it wants none.

    ACK, CANCEL and RECEIVED are answered CLOSED, a terminal word CANCEL: the peer can stop. A FETCH is answered
    FAILED(unknown): ask for that only when `DISPATCH_GRACE_S` has passed without the router's DISPATCH.
    """
    header = _answering(message.header, me, sequence)
    if isinstance(message, Ack | Cancel | Received):
        return Closed(header)
    if isinstance(message, Fetch):
        return Failed(header, reasons.UNKNOWN)
    if isinstance(message, Done | Failed | Cancelled):
        return Cancel(header, reasons.UNKNOWN)
    return None


def _answering(header: Header, me: str, sequence: int) -> Header:
    return Header(me, header.source, header.transfer_id, header.epoch, sequence)
