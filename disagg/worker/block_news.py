"""Tells the router which blocks the prefix cache has, once it asks: the whole set first, then what changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from disagg.cache.journal import BlockDropped, BlockEvent, BlockJournal, BlockStored, JournalRestart
from disagg.transceiver.wire.messages.blocks import (
    DROPPED,
    MAX_EVENT_TOKENS,
    MAX_EVENTS,
    MAX_GROUP_SETS,
    NUM_KINDS,
    STORED_BEHIND,
    STORED_FIRST,
    STORED_NEXT,
    AskBlocks,
    BlockEvents,
)

TELL_S: Final = 0.5
"""Twice a second: a turn of a chat comes seconds after the one before it, and messages stay few."""

MAX_MESSAGES: Final = 16
"""At once: 65,000 events, 2 MB. What is more waits in the journal, so a router that reads slowly is not flooded."""


class BlockNews:
    """Of one registration. `run` belongs to the event loop, as does all else; the journal is the model thread's."""

    def __init__(
        self,
        journal: BlockJournal,
        incarnation: str,
        block_size: int,
        send: Callable[[BlockEvents], None],
        on_model_thread: Callable[[Callable[[], None]], None],
    ) -> None:
        """`on_model_thread(call)`: have it called there, between two steps."""
        self._journal, self._incarnation, self._block_size = journal, incarnation, block_size
        self._send, self._on_model_thread = send, on_model_thread
        self._sequence, self._with_tokens, self._has_told_loss = 0, False, False

    def ask(self, message: AskBlocks) -> None:
        """The router wants the whole set, and what changes from there on."""
        self._with_tokens, self._has_told_loss = message.tokens, False
        self._on_model_thread(self._journal.begin)

    async def run(self) -> None:
        """Serve until cancelled; then the journal is off."""
        try:
            while True:
                await asyncio.sleep(TELL_S)
                await self._tell()
        finally:
            self._journal.end()

    async def _tell(self) -> None:
        most = MAX_EVENTS if not self._with_tokens else max(1, min(MAX_EVENTS, MAX_EVENT_TOKENS // self._block_size))
        if self._journal.is_lost and not self._has_told_loss:
            self._has_told_loss = True
            self._sequence += 1  # a gap, at which the router asks
            self._say(events_message(self._incarnation, self._sequence, self._block_size, ()))
        for _ in range(MAX_MESSAGES):
            if not (events := self._journal.take(most)):
                return
            for few in _by_group_sets(events):
                self._say(events_message(self._incarnation, self._sequence, self._block_size, few, self._with_tokens))
            await asyncio.sleep(0)  # a message takes a few ms to make

    def _say(self, message: BlockEvents) -> None:
        self._send(message)
        self._sequence += 1


def events_message(
    incarnation: str, sequence: int, block_size: int, events: Sequence[BlockEvent], with_tokens: bool = False
) -> BlockEvents:
    """`events`: of at most `MAX_GROUP_SETS` different sets of groups; a `JournalRestart` only as the first."""
    is_reset = bool(events) and isinstance(events[0], JournalRestart)
    sets: dict[tuple[int, ...], int] = {}
    ops, parents, before = bytearray(), bytearray(), b""
    changes = [event for event in events if not isinstance(event, JournalRestart)]
    for event in changes:
        kind = _kind_of(event, before)
        ops.append(NUM_KINDS * sets.setdefault(event.groups, len(sets)) + kind)
        before = event.identity
        if isinstance(event, BlockStored) and kind == STORED_BEHIND:
            parents += event.parent
    identities = b"".join([event.identity for event in changes])
    tokens = _ids(event.tokens for event in changes if isinstance(event, BlockStored)) if with_tokens else b""
    groups = tuple(sets)
    return BlockEvents(
        incarnation, sequence, block_size, groups, bytes(ops), identities, bytes(parents), tokens, is_reset
    )


def _kind_of(event: BlockStored | BlockDropped, before: bytes) -> int:
    if isinstance(event, BlockDropped):
        return DROPPED
    if not event.parent:
        return STORED_FIRST
    return STORED_NEXT if event.parent == before else STORED_BEHIND


def _ids(blocks: Iterable[bytes]) -> bytes:
    """`token_bytes`, which have 64 bits each, as 32."""
    return np.frombuffer(b"".join(blocks), dtype="<i8").astype("<i4").tobytes()


def _by_group_sets(events: Sequence[BlockEvent]) -> list[Sequence[BlockEvent]]:
    """Cut where one message would need more sets of groups than it can name: hardly ever."""
    parts: list[Sequence[BlockEvent]] = []
    first, seen = 0, set[tuple[int, ...]]()
    for number, event in enumerate(events):
        if isinstance(event, JournalRestart) or event.groups in seen:
            continue
        if len(seen) == MAX_GROUP_SETS:
            parts.append(events[first:number])
            first, seen = number, set()
        seen.add(event.groups)
    return [*parts, events[first:]]
