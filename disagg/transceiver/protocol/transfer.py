"""One transfer's attempt, as the shell holds it: events in, actions out. No clock, no socket, no await.

actions = transfer.handle(event, now)     # perform them in order
wakeup = transfer.next_wakeup()           # handle(Tick(), now) then, at the latest
"""

from __future__ import annotations

from collections.abc import Mapping

from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.protocol.actions import Action
from disagg.transceiver.protocol.events import Event
from disagg.transceiver.protocol.receiver import Order, Receiver
from disagg.transceiver.protocol.sender import Offer, Sender
from disagg.transceiver.protocol.side import Ends, Side
from disagg.transceiver.protocol.state import Role, State
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.peer import TransferMessage
from disagg.transceiver.wire.messages.values import Geometry


class Transfer:
    """One end of one (transfer, epoch), made at DISPATCH. Build with `sender` or `receiver`."""

    def __init__(self, side: Side) -> None:
        self._side = side

    @classmethod
    def sender(
        cls,
        *,
        transfer_id: str,
        epoch: int,
        me: str,
        peer: str,
        prompt: tuple[int, ...],
        geometry: Geometry,
        unit_nbytes: tuple[int, ...],
        planes: Mapping[str, bool],
        keys: ClusterKeys,
        deadline_s: float,
        now: float,
        part: Part | None = None,
    ) -> Transfer:
        """The prefill end. `me` and `peer` are incarnations; `unit_nbytes` the slot bytes of each group.

        `planes`: the planes offered to this peer, each with whether the sender pushes its bytes. `deadline_s` is
        DISPATCH's, exactly: it is bound by the ticket. `part`: between workers of several ranks, what this pair moves.
        """
        offer = Offer(prompt, geometry, unit_nbytes, planes, keys, deadline_s, part or Part.whole(geometry.groups))
        return cls(Sender(Ends(transfer_id, epoch, me, peer), offer, now))

    @classmethod
    def receiver(
        cls,
        *,
        transfer_id: str,
        epoch: int,
        me: str,
        peer: str,
        ticket: bytes,
        plane: str,
        geometry: Geometry,
        keys: ClusterKeys,
        deadline_s: float,
        now: float,
        part: Part | None = None,
    ) -> Transfer:
        """The decode end. `ticket` is DISPATCH's; `plane` the one agreed with the peer in HELLO."""
        order = Order(ticket, plane, geometry, keys, deadline_s, part or Part.whole(geometry.groups))
        return cls(Receiver(Ends(transfer_id, epoch, me, peer), order, now))

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event; the actions are to be performed in order.

        Raises `RemoteProtocolError` for a message that is not legal now or not of this transfer and
        `LocalProtocolError` for an event this process may not raise now; both change nothing.
        """
        return self._side.handle(event, now)

    def next_wakeup(self) -> float | None:
        """Clock seconds at which `Tick` must be handled, or None when nothing waits for time."""
        return self._side.next_wakeup()

    @property
    def key(self) -> tuple[str, int]:
        """(transfer_id, epoch)"""
        return self._side.ends.transfer_id, self._side.ends.epoch

    @property
    def peer(self) -> str:
        """The peer's incarnation."""
        return self._side.ends.peer

    @property
    def role(self) -> Role:
        return self._side.role

    @property
    def state(self) -> State:
        return self._side.state

    @property
    def is_over(self) -> bool:
        return self.state is State.CLOSED

    @property
    def wants_lease(self) -> bool:
        """Should this end's heartbeats name the transfer? While it still reads the peer's sources."""
        return self.state in (State.FETCHING, State.LANDING)

    @property
    def last_word(self) -> TransferMessage | None:
        """What `Tombstones` must repeat to a peer that asks again after the end."""
        return self._side.last_word
