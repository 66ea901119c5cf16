"""What a worker says of the blocks in its prefix cache: which it registered and which it dropped, in order.

An event is one byte of `ops` and 16 of `identities`, so that a reader which only hands it on looks at none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from disagg.transceiver.wire.messages.ranges import (
    MAX_BLOCK_SIZE,
    MAX_GROUPS,
    MAX_INT64,
    check_id,
    check_int,
    check_ints,
    check_size,
    fail,
)

BLOCK_NAME_NBYTES: Final = 16
"""Of one block's identity."""

DROPPED, STORED_NEXT, STORED_BEHIND, STORED_FIRST = range(4)
"""Kinds of events: dropped; stored behind the block of the event before, behind one of `parents`, behind none."""
NUM_KINDS: Final = 4

MAX_GROUP_SETS: Final = 256 // NUM_KINDS
"""A byte names one of them with the kind. A model has a handful of groups; what needs more is cut into messages."""

MAX_EVENTS: Final = 4096
"""Of one message: 128 KiB with every parent named, which a link carries in about a millisecond."""

MAX_EVENT_TOKENS: Final = 1 << 16
"""Of one message, where token ids go along: as many bytes again."""

TOKEN_NBYTES: Final = 4


@dataclass(frozen=True, slots=True)
class BlockEvents:
    """Worker -> router. `sequence` counts these messages of a registration from 0 on, without a gap.

    `is_reset`: what was said before is void, and the whole set follows. `ops[i]` = 4 * index in `group_sets` + kind.
    `parents`: 16 bytes for each event of the kind that names one. `tokens`: little-endian int32 ids of each stored
    block, where the router asked for them, else empty.
    """

    incarnation: str
    sequence: int
    block_size: int
    group_sets: Annotated[tuple[Annotated[tuple[int, ...], MAX_GROUPS], ...], MAX_GROUP_SETS]
    ops: bytes
    identities: bytes
    parents: bytes = b""
    tokens: bytes = b""
    is_reset: bool = False

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        check_int("sequence", self.sequence, 0, MAX_INT64)
        check_int("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        check_size("group_sets", self.group_sets, MAX_GROUP_SETS)
        for groups in self.group_sets:
            check_ints("group_sets", groups, 0, MAX_GROUPS - 1)
        check_size("ops", self.ops, MAX_EVENTS)
        if self.ops:
            check_int("ops", max(self.ops), 0, NUM_KINDS * len(self.group_sets) - 1)
        named = self._count(STORED_BEHIND)
        stored = named + self._count(STORED_NEXT) + self._count(STORED_FIRST)
        self._check_nbytes("identities", BLOCK_NAME_NBYTES * len(self.ops))
        self._check_nbytes("parents", BLOCK_NAME_NBYTES * named)
        if self.tokens:
            self._check_nbytes("tokens", TOKEN_NBYTES * self.block_size * stored)

    def _count(self, kind: int) -> int:
        return sum(self.ops.count(NUM_KINDS * number + kind) for number in range(len(self.group_sets)))

    def _check_nbytes(self, name: str, expected: int) -> None:
        if len(getattr(self, name)) != expected:
            fail(name, len(getattr(self, name)), f"{expected} bytes")


@dataclass(frozen=True, slots=True)
class AskBlocks:
    """Router -> worker: say the whole set, for a message was missed. `tokens`: with token ids from here on."""

    incarnation: str
    tokens: bool = False

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
