"""The sink's end of a `prefix`: asks for cached blocks of a prompt that this worker is about to compute.

The states are a receiver's. What differs: it asks before there is room, hears from the source how far the blocks reach,
computes from that what must move, and only then has room made; slices that came meanwhile are landed after that. Its
verdict is `PrefixVerified`, which registers blocks and licenses no answer. Whatever goes wrong, the prompt is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from disagg.transceiver.layout.boundary import missing_at, ordinals_of
from disagg.transceiver.protocol.actions import AskRoom, Land, PrefixVerified
from disagg.transceiver.protocol.events import FetchWanted, Reserved
from disagg.transceiver.protocol.inbox import Inbox
from disagg.transceiver.protocol.manifest import is_sealed
from disagg.transceiver.protocol.receiver import Order, Receiver
from disagg.transceiver.protocol.state import State
from disagg.transceiver.protocol.transfer import Ends, Reactions
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.errors import LocalProtocolError
from disagg.transceiver.wire.messages.peer import Accepted, Ack, Done, Fetch, Slice
from disagg.transceiver.wire.messages.values import GroupRuns
from disagg.transceiver.wire.purposes import PREFIX


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a prompt may begin with: blocks of its first `boundary` tokens, more than the `own` that this worker has.

    `tips[i]`: the identity of the source's block i, in blocks of `source_block_size`, as this worker names it. `held`:
    what is here, in blocks of `block_size`, below the boundary.
    """

    boundary: int
    own: int
    tips: tuple[bytes, ...]
    held: tuple[GroupRuns, ...]
    block_size: int
    source_block_size: int

    def tip(self, boundary: int) -> bytes:
        """The identity of the source's block that ends at `boundary`; none before the first."""
        return self.tips[boundary // self.source_block_size - 1] if boundary else b""

    def allows(self, boundary: int) -> bool:
        """Whether an honest source may answer with this boundary: more than is here, in whole blocks of both ends."""
        coarser = max(self.block_size, self.source_block_size)
        return boundary == 0 or (self.own < boundary <= self.boundary and boundary % coarser == 0)


class PrefixReceiver(Receiver):
    purpose: ClassVar[str] = PREFIX

    def __init__(self, ends: Ends, order: Order, wanted: Wanted, now: float) -> None:
        super().__init__(ends, order, now)
        self._wanted = wanted
        self._boundary: int | None = None
        self._required: tuple[GroupRuns, ...] = ()
        self._has_room = False
        self._unlanded: list[Slice] = []
        """Slices that came before there was room."""

    def _check(self, subject: Any) -> None:
        match subject:
            case FetchWanted():
                return
            case Reserved() if self.state is State.WAITING:
                raise LocalProtocolError("a prefix is asked for before there is room for it")
            case Reserved(required, prompt_len) if self.state is State.LANDING:
                if (required, prompt_len) != (self._required, self._boundary) or self._has_room:
                    raise LocalProtocolError(f"room for other units than were asked for, or twice: {required}")
            case Reserved():
                return
            case _:
                super()._check(subject)

    # --- asking and landing ---------------------------------------------------------------------------------

    def _ask_first(self, event: FetchWanted) -> None:
        wanted = self._wanted
        self._insist(
            Fetch(
                self._header(),
                self._order.ticket,
                wanted.boundary,
                (),
                self._order.plane,
                self.purpose,
                wanted.tip(wanted.boundary),
                wanted.held,
            )
        )

    def _take_accepted(self, message: Accepted) -> None:
        if self._boundary is not None:
            return
        self._repeat.stop()
        self._poll.start(self._now)
        if not self._wanted.allows(message.boundary) or message.precision:
            self._fault(reasons.PROTOCOL)
            return
        self._boundary, self._required = message.boundary, self._missing_at(message.boundary)
        self._inbox = Inbox((entry.group, ordinal) for entry in self._required for ordinal in entry.ordinals)
        if self._required:
            self._do(AskRoom(message.boundary, self._required))

    def _missing_at(self, boundary: int) -> tuple[GroupRuns, ...]:
        groups, wanted = self._order.geometry.groups, self._wanted
        held = ordinals_of(wanted.held, len(groups))
        return missing_at(groups, boundary, self._order.geometry.block_size, held, wanted.block_size)

    def _take_slice(self, message: Slice) -> None:
        if self._boundary is not None:  # else it overtook ACCEPTED, and is said again
            super()._take_slice(message)

    def _land(self, message: Slice) -> None:
        if self._has_room:
            self._do(Land(message))
        else:
            self._unlanded.append(message)

    def _take_room(self, event: Reserved) -> None:
        self._has_room = True
        waiting, self._unlanded = self._unlanded, []
        for message in waiting:
            self._do(Land(message))

    # --- the verdict ----------------------------------------------------------------------------------------

    def _take_done(self, done: Done) -> None:
        if self._boundary is not None:
            super()._take_done(done)

    @property
    def _has_first_token(self) -> bool:
        return False

    def _is_sealed(self, done: Done) -> bool:
        assert self._boundary is not None, "DONE is looked at once the boundary is known"
        is_ours = done.boundary == self._boundary
        return is_ours and is_sealed(self._order.keys.manifest_mac, done, self._wanted.tip(self._boundary))

    def _give_licence(self, done: Done) -> None:
        self._insist(Ack(self._header()))
        self._give_up_later()
        self._do(PrefixVerified(self.ends.transfer_id, self.ends.epoch, done.boundary))

    # --- what to do on each step ----------------------------------------------------------------------------

    reactions: ClassVar[Reactions] = {
        **Receiver.reactions,
        State.WAITING: {**Receiver.reactions[State.WAITING], FetchWanted: _ask_first},
        State.LANDING: {**Receiver.reactions[State.LANDING], Reserved: _take_room},
    }
