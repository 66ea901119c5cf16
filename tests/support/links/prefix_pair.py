"""Two cores of a `prefix`, over the links and the clock of `TransferPair`: a cache that exists as sets of ordinals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from support.links.lossy_link import LossyLink
from support.links.transfer_pair import (
    COMPUTE_ID,
    DEADLINE_S,
    DECODE,
    GEOMETRY,
    KEYS,
    PLANES,
    PREFILL,
    TRANSFER_ID,
    UNIT_NBYTES,
    TransferPair,
    digest_of,
)

from disagg.transceiver.layout.boundary import common_boundary, ordinals_of
from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.required import runs_of
from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.protocol.actions import Action, AskPrefix, AskRoom, PrefixVerified, ReportFailed
from disagg.transceiver.protocol.actions import FreeReservation as Freed
from disagg.transceiver.protocol.events import FetchWanted, Pinned, Reserved, UnitsFinal
from disagg.transceiver.protocol.prefix_sink import PrefixReceiver, Wanted
from disagg.transceiver.protocol.prefix_source import Lendable, PrefixSender
from disagg.transceiver.protocol.receiver import Order
from disagg.transceiver.protocol.sender import Offer
from disagg.transceiver.protocol.transfer import Ends, Transfer
from disagg.transceiver.wire.messages.values import GroupRuns
from disagg.transceiver.wire.purposes import PREFIX
from disagg.transceiver.wire.ticket import LegClaims, mint_leg

REQUEST = "r" * 32
NUM_GROUPS = len(GEOMETRY.groups)
Ordinals = tuple[frozenset[int], ...]
NOTHING: Ordinals = (frozenset(),) * NUM_GROUPS


def tips_of(num_blocks: int, block_size: int) -> tuple[bytes, ...]:
    """What both ends call blocks of the pretended prompt."""
    return tuple(blake2b(f"{block_size} {n}".encode(), digest_size=16).digest() for n in range(num_blocks))


def runs(held: Ordinals) -> tuple[GroupRuns, ...]:
    ordinals = (np.array(sorted(some), dtype=np.int64) for some in held)
    every = (GroupRuns(group, runs_of(some)) for group, some in enumerate(ordinals))
    return tuple(entry for entry in every if entry.runs)


@dataclass(frozen=True)
class Prefix:
    """What the ends have of one prompt: `resident` at the source, `held` at the sink, in blocks of their own sizes."""

    boundary: int = 24
    resident: Ordinals = (frozenset(range(6)),) * NUM_GROUPS
    held: Ordinals = NOTHING
    source_size: int = 4
    sink_size: int = 4
    own: int = 0

    @property
    def unit(self) -> int:
        return min(self.source_size, self.sink_size)

    @property
    def claims(self) -> LegClaims:
        tip = tips_of(self.boundary // self.source_size, self.source_size)[-1]
        return LegClaims(PREFIX, TRANSFER_ID, 0, REQUEST, PREFILL, DECODE, self.boundary, tip)

    def common(self) -> int:
        """What the source's engine says."""
        known = self.boundary // self.source_size
        resident = [np.array([o in some for o in range(known)], dtype=np.bool_) for some in self.resident]
        held = [sorted(some) for some in self.held]
        return common_boundary(GEOMETRY.groups, self.boundary, resident, self.source_size, held, self.sink_size)

    def units(self, boundary: int) -> tuple[HashedUnit, ...]:
        """Every unit below the boundary that the source has."""
        per_block = self.source_size // self.unit
        names = [
            (group, o)
            for group, some in enumerate(self.resident)
            for o in range(boundary // self.unit)
            if o // per_block in some
        ]
        return tuple(HashedUnit(g, o, 0, 10 + o, 3, digest_of(g, o)) for g, o in names)


def make_prefix_sender(prefix: Prefix, now: float = 0.0) -> PrefixSender:
    geometry = replace(GEOMETRY, block_size=prefix.unit)
    tokens = tuple(range(prefix.boundary))
    part = Part.whole(GEOMETRY.groups)
    offer = Offer(tokens, geometry, UNIT_NBYTES, PLANES, KEYS, DEADLINE_S, part)
    tips = tips_of(prefix.boundary // prefix.source_size, prefix.source_size)
    lendable = Lendable(REQUEST, tips, prefix.source_size, prefix.sink_size)
    return PrefixSender(Ends(TRANSFER_ID, 0, PREFILL, DECODE), offer, lendable, now)


def make_prefix_receiver(prefix: Prefix, plane: str = "shm", ticket: bytes | None = None) -> PrefixReceiver:
    geometry = replace(GEOMETRY, block_size=prefix.unit)
    minted = mint_leg(KEYS.ticket, prefix.claims, DEADLINE_S)
    order = Order(ticket or minted, plane, geometry, KEYS, DEADLINE_S, Part.whole(GEOMETRY.groups))
    tips = tips_of(prefix.boundary // prefix.source_size, prefix.source_size)
    wanted = Wanted(prefix.boundary, prefix.own, tips, runs(prefix.held), prefix.sink_size, prefix.source_size)
    return PrefixReceiver(Ends(TRANSFER_ID, 0, DECODE, PREFILL), order, wanted, 0.0)


class PrefixPair(TransferPair):
    """Both ends of a prefix. `find` and `make_room` are what the two engines do; `is_prompt` has them do it at once."""

    def __init__(
        self, prefix: Prefix | None = None, *, plane: str = "shm", link: LossyLink | None = None, is_prompt: bool = True
    ) -> None:
        super().__init__(plane=plane, link=link)
        self.prefix = prefix or Prefix()
        self.sender = make_prefix_sender(self.prefix)
        self.receiver = make_prefix_receiver(self.prefix, plane)
        self.is_prompt = is_prompt
        self.asked: AskPrefix | None = None
        self.room: AskRoom | None = None

    def _perform(self, end: Transfer, action: Action) -> None:
        match action:
            case AskPrefix():
                assert self.asked is None
                self.asked = action
                if self.is_prompt:
                    self.find()
            case AskRoom():
                assert self.room is None
                self.room = action
                if self.is_prompt:
                    self.make_room()
            case _:
                super()._perform(end, action)

    def want(self) -> None:
        self.feed(self.receiver, FetchWanted())

    def find(self) -> None:
        boundary = self.prefix.common()
        self.feed(self.sender, Pinned(COMPUTE_ID, boundary))
        if boundary:
            self.feed(self.sender, UnitsFinal(COMPUTE_ID, self.prefix.units(boundary)))

    def make_room(self) -> None:
        assert self.room is not None
        self.required = self.room.required
        self.feed(self.receiver, Reserved(self.room.required, self.room.boundary))

    @property
    def verdicts(self) -> list[Any]:
        kinds = PrefixVerified | ReportFailed | Freed
        return [action for action in self.actions["receiver"] if isinstance(action, kinds)]

    @property
    def landed(self) -> list[set[int]]:
        """Per group, the units that room was made for."""
        return [set(some.tolist()) for some in ordinals_of(self.required, NUM_GROUPS)]

    def check_invariants(self) -> None:
        super().check_invariants()
        for verdict in self.verdicts:
            if isinstance(verdict, PrefixVerified):
                assert verdict.boundary == self.prefix.common()
                assert not self.corrupt & self.required_keys
