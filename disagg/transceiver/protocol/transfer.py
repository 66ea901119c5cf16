"""One end of one attempt of a transfer, as the shell holds it: events in, actions out. No clock, no socket, no await.

actions = transfer.handle(event, now)     # perform them in order
wakeup = transfer.next_wakeup()           # handle(Tick(), now) then, at the latest
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from disagg.transceiver.protocol.actions import Action, Forget, Send
from disagg.transceiver.protocol.events import Event, MessageArrived
from disagg.transceiver.protocol.state import Decision, Kind, Role, State, next_state
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.peer import Header, Refused, TransferMessage
from disagg.transceiver.wire.purposes import HANDOFF
from disagg.transceiver.wire.repeat import Repeat
from disagg.transceiver.wire.timing import LEASE_S

Reactions = Mapping[State, Mapping[Kind, Callable[[Any, Any], object]]]
"""What an end does on each legal kind in each state; the subject is the event, the message or what was decided on.

A legal pair that is not in it moves the state and asks for nothing.
"""


@dataclass(frozen=True, slots=True)
class Ends:
    """One attempt of one transfer as this process sees it: `me` and `peer` are incarnations."""

    transfer_id: str
    epoch: int
    me: str
    peer: str


class Transfer(ABC):
    """One end of one (transfer, epoch), made at DISPATCH: a `Sender` or a `Receiver`."""

    role: ClassVar[Role]
    purpose: ClassVar[str] = HANDOFF
    reactions: ClassVar[Reactions]

    def __init__(self, ends: Ends, deadline_s: float, now: float) -> None:
        self.ends = ends
        self.state = State.WAITING
        self.deadline = now + deadline_s
        self.last_word: TransferMessage | None = None
        """What this end said last that wants an answer: repeated until answered, then kept for the tombstone."""
        self._repeat = Repeat()
        self._give_up_at: float | None = None
        self._now = now
        self._sequence = 0
        self._actions: list[Action] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event; the actions are to be performed in order.

        Raises `RemoteProtocolError` for a message that is not legal now or not of this transfer and
        `LocalProtocolError` for an event this process may not raise now; both change nothing.
        """
        subject = event.message if isinstance(event, MessageArrived) else event
        target = next_state(self.role, self.state, type(subject))
        if isinstance(event, MessageArrived):
            self._check_address(event.message)
        self._check(subject)
        was, self._now, self._actions = self.state, now, []
        self._step(target, type(subject), subject)
        if self.state is State.CLOSED and was is not State.CLOSED:
            self._close()
        return self._actions

    def next_wakeup(self) -> float | None:
        """Clock seconds at which `Tick` must be handled, or None when nothing waits for time.

        Always later than the last event's time once that was handled.
        """
        return min((at for at in self._alarms() if at is not None), default=None)

    @property
    def peer(self) -> str:
        """The peer's incarnation."""
        return self.ends.peer

    @property
    def is_over(self) -> bool:
        return self.state is State.CLOSED

    @property
    def wants_lease(self) -> bool:
        """Should this end's heartbeats name the transfer? While it still reads the peer's sources."""
        return self.state in (State.FETCHING, State.EXTENDING, State.LANDING)

    # --- for subclasses -------------------------------------------------------------------------------------

    @abstractmethod
    def _check(self, subject: Any) -> None:
        """Raise a protocol error when a legal kind carries impossible content."""

    @abstractmethod
    def _alarms(self) -> tuple[float | None, ...]:
        """Times at which something must be repeated or given up; none once the state is CLOSED."""

    def _decide(self, decision: Decision, subject: object = None) -> None:
        """Take the step of a decision; its reaction gets `subject`, or the decision where there is none."""
        self._step(next_state(self.role, self.state, decision), decision, subject or decision)

    def _do(self, action: Action) -> None:
        self._actions.append(action)

    def _send(self, message: TransferMessage | Refused) -> None:
        self._do(Send(message))

    def _insist(self, message: TransferMessage) -> None:
        """Send and repeat until answered."""
        self.last_word = message
        self._repeat.start(self._now)
        self._send(message)

    def _repeat_last_word(self, subject: object = None) -> None:
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

    def _step(self, target: State, kind: Kind, subject: Any) -> None:
        """Enter `target`, then do what the state that was left does on `kind`."""
        reaction = self.reactions[self.state].get(kind)
        self.state = target
        if reaction is not None:
            getattr(self, reaction.__name__)(subject)  # by name: an end of another purpose has methods of its own

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
