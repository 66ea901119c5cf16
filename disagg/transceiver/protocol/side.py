"""What both ends of a transfer share: its two ends, its state, its timers, and how an event becomes actions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from disagg.transceiver.protocol.actions import Action, Forget, Send
from disagg.transceiver.protocol.events import Event, MessageArrived
from disagg.transceiver.protocol.state import Kind, Role, State, kind_of, next_state
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.peer import Header, Refused, TransferMessage
from disagg.transceiver.wire.repeat import Repeat
from disagg.transceiver.wire.timing import LEASE_S


@dataclass(frozen=True, slots=True)
class Ends:
    """One attempt of one transfer as this process sees it: `me` and `peer` are incarnations."""

    transfer_id: str
    epoch: int
    me: str
    peer: str


class Side(ABC):
    """One end of one (transfer, epoch). Subclasses say what to do on each kind; the table says what is legal."""

    role: ClassVar[Role]

    def __init__(self, ends: Ends, deadline_s: float, now: float) -> None:
        self.ends = ends
        self.state = State.WAITING
        self.deadline = now + deadline_s
        self.last_word: TransferMessage | None = None
        """What this end said last that wants an answer: repeated until answered, then kept for the tombstone."""
        self._repeat = Repeat()
        self._give_up_at: float | None = None
        self._was = State.WAITING
        self._now = now
        self._sequence = 0
        self._actions: list[Action] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event. Raises a protocol error and changes nothing when the event is not legal now."""
        kind = kind_of(event)
        target = next_state(self.role, self.state, kind)
        subject = event.message if isinstance(event, MessageArrived) else event
        if isinstance(event, MessageArrived):
            self._check_address(event.message)
        self._check(kind, subject)
        self._was, self.state, self._now, self._actions = self.state, target, now, []
        self._reactions().get(kind, _nothing)(subject)
        if self.state is State.CLOSED and self._was is not State.CLOSED:
            self._close()
        return self._actions

    def next_wakeup(self) -> float | None:
        """When `Tick` is due (clock seconds), always later than the last event's time once that was handled."""
        return min((at for at in self._alarms() if at is not None), default=None)

    # --- for subclasses -------------------------------------------------------------------------------------

    @abstractmethod
    def _reactions(self) -> Mapping[Kind, Callable[[Any], None]]:
        """What to do on each kind, after the state has changed; `self._was` is the state before."""

    @abstractmethod
    def _check(self, kind: Kind, subject: Any) -> None:
        """Raise a protocol error when a legal kind carries impossible content."""

    @abstractmethod
    def _alarms(self) -> tuple[float | None, ...]:
        """Times at which something must be repeated or given up; none once the state is CLOSED."""

    def _decide(self, kind: Kind) -> None:
        self.state = next_state(self.role, self.state, kind)

    def _do(self, action: Action) -> None:
        self._actions.append(action)

    def _send(self, message: TransferMessage | Refused) -> None:
        self._do(Send(message))

    def _insist(self, message: TransferMessage) -> None:
        """Send and repeat until answered."""
        self.last_word = message
        self._repeat.start(self._now)
        self._send(message)

    def _repeat_last_word(self) -> None:
        if self.last_word is not None:
            self._send(replace(self.last_word, header=self._header()))

    def _header(self) -> Header:
        self._sequence += 1
        ends = self.ends
        return Header(ends.me, ends.peer, ends.transfer_id, ends.epoch, self._sequence)

    def _give_up_later(self) -> None:
        # Nothing is held for the peer any more: insisting for one lease is courtesy to one that is slow.
        self._give_up_at = self._now + LEASE_S

    # --- own ------------------------------------------------------------------------------------------------

    def _check_address(self, message: TransferMessage | Refused) -> None:
        ends = self.ends
        named = message if isinstance(message, Refused) else message.header
        if (named.transfer_id, named.epoch) != (ends.transfer_id, ends.epoch):
            raise RemoteProtocolError(f"message of transfer {named.transfer_id} epoch {named.epoch} reached {ends}")
        if isinstance(named, Header) and (named.source, named.destination) != (ends.peer, ends.me):
            raise RemoteProtocolError(f"message from {named.source} to {named.destination} reached {ends}")

    def _close(self) -> None:
        self._repeat.stop()
        self._do(Forget(max(self.deadline, self._now) + LEASE_S))


def _nothing(subject: Any) -> None:
    """A legal event that asks for nothing in this state."""
