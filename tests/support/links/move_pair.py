"""Both ends of the move of an answer, over the same pretend link, engine and pool as `TransferPair`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from support.links.transfer_pair import (
    DEADLINE_S,
    DECODE,
    GEOMETRY,
    KEYS,
    PLANES,
    PREFILL,
    PROMPT,
    TRANSFER_ID,
    UNIT_NBYTES,
    TransferPair,
    final_unit,
)

from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.required import needed_units, required_units, runs_of
from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.protocol.actions import AskExtension, Verified
from disagg.transceiver.protocol.events import Extended, Frozen, RoomMade, RoomRefused, UnitsFinal
from disagg.transceiver.protocol.move_sink import MoveOrder, MoveSink
from disagg.transceiver.protocol.move_source import FROZEN_ID, MoveOffer, MoveSource
from disagg.transceiver.protocol.receiver import Order
from disagg.transceiver.protocol.sender import Offer
from disagg.transceiver.protocol.transfer import Ends, Transfer
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.messages.values import FirstToken, GroupRuns, SamplingState, TokenLogprobs

REQUEST = "f" * 32
OUTPUT = tuple(range(40, 52))
"""What the answer is when it stands still."""
FIRST_INDEX = 5
"""What the router has of it."""
LOGPROBS = tuple(TokenLogprobs(-float(i)) for i in range(len(OUTPUT) - FIRST_INDEX))
SEED = 11
BOUNDARY = len(PROMPT) + len(OUTPUT) - 1
KNOWN = len(PROMPT) + FIRST_INDEX - 1
FROZEN = Frozen(OUTPUT, LOGPROBS, SEED)
LICENCE = Verified(REQUEST, 0, FirstToken(OUTPUT[-1], LOGPROBS[-1], SamplingState(SEED)))
Held = tuple[Collection[int], ...]


def move_ticket(epoch: int = 0, **changes: Any) -> bytes:
    named = {"request": REQUEST, "source": PREFILL, "sink": DECODE, "prompt": PROMPT, "num_tokens": FIRST_INDEX}
    return ticket.mint_leg(KEYS.ticket, ticket.move_claims(TRANSFER_ID, epoch, **(named | changes)), DEADLINE_S)


def make_move_source(now: float = 0.0, epoch: int = 0, unit_nbytes: tuple[int, ...] = UNIT_NBYTES) -> MoveSource:
    offer = Offer(
        prompt=PROMPT,
        geometry=GEOMETRY,
        unit_nbytes=unit_nbytes,
        planes=PLANES,
        keys=KEYS,
        ttl_s=DEADLINE_S,
        part=Part.whole(GEOMETRY.groups),
    )
    return MoveSource(Ends(TRANSFER_ID, epoch, PREFILL, DECODE), MoveOffer(offer, REQUEST, FIRST_INDEX), now)


def make_move_sink(now: float = 0.0, epoch: int = 0, plane: str = "shm", shown: bytes | None = None) -> MoveSink:
    order = Order(
        ticket=move_ticket(epoch) if shown is None else shown,
        plane=plane,
        geometry=GEOMETRY,
        keys=KEYS,
        deadline_s=DEADLINE_S,
        part=Part.whole(GEOMETRY.groups),
    )
    move = MoveOrder(order, REQUEST, PROMPT, OUTPUT[:FIRST_INDEX])
    return MoveSink(Ends(TRANSFER_ID, epoch, DECODE, PREFILL), move, now)


def frozen_units() -> tuple[HashedUnit, ...]:
    need = needed_units(GEOMETRY.groups, BOUNDARY, GEOMETRY.block_size)
    return tuple(final_unit(entry.group, ordinal) for entry in need for ordinal in entry.ordinals)


def room_made(held: Held = ((), ())) -> RoomMade:
    return RoomMade(
        tuple(GroupRuns(group, runs_of(np.array(sorted(some), dtype=np.int64))) for group, some in enumerate(held))
    )


def room_for_all(held: Held = ((), ())) -> Extended:
    return Extended(required_units(GEOMETRY.groups, BOUNDARY, GEOMETRY.block_size, held))


class MovePair(TransferPair):
    """`freezes`, `extends`: whether the engines answer at once. `held`: what the sink has of the answer."""

    newest = LICENCE.first_token

    def __init__(self, *, freezes: bool = True, extends: bool = True, held: Held = ((), ()), **options: Any) -> None:
        self.freezes, self.extends, self.held = freezes, extends, held
        self.is_frozen = False
        super().__init__(**options)

    def make_ends(self, plane: str, epoch: int) -> tuple[Transfer, Transfer]:
        return make_move_source(epoch=epoch), make_move_sink(epoch=epoch, plane=plane)

    def _perform(self, end: Transfer, action: Any) -> None:
        super()._perform(end, action)
        if self.is_pin_wanted and self.freezes and not self.is_frozen:
            self.freeze()
        if isinstance(action, AskExtension) and self.extends:
            self.extend()

    def begin(self) -> None:
        event = room_made(self.held)
        self.required = room_for_all(self.held).required
        self.feed(self.receiver, event)

    def freeze(self) -> None:
        self.is_frozen = True
        self.feed(self.sender, FROZEN)
        self.feed(self.sender, UnitsFinal(FROZEN_ID, frozen_units()))

    def extend(self) -> None:
        self.feed(self.receiver, room_for_all(self.held))

    def refuse_room(self) -> None:
        self.feed(self.receiver, RoomRefused("no_room"))
