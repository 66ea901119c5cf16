"""What is registered in a prefix cache and what is dropped, in order, for a router that asks which worker holds what.

The thread that owns the cache writes, any other reads. It is bounded: where its reader does not keep up, all that waits
is thrown away and the reader is told, so that it asks for the whole set anew.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from disagg.cache.prefix import NO_SLOT, PrefixNode

MAX_WAITING: Final = 1 << 18
"""Events between two looks of the reader, twice a second: four times what a whole fleet of 62,000 stored and as many
dropped blocks a second makes; 30 MB."""


@dataclass(frozen=True, slots=True)
class BlockStored:
    """One block is usable in these groups. `parent`: the one before it, b"" for a first. `tokens`: `token_bytes`."""

    identity: bytes
    groups: tuple[int, ...]
    parent: bytes
    tokens: bytes


@dataclass(frozen=True, slots=True)
class BlockDropped:
    """One block is not usable in these groups any more."""

    identity: bytes
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class JournalRestart:
    """Forget what was said before: the whole set follows."""


BlockEvent = BlockStored | BlockDropped | JournalRestart


class BlockJournal:
    """Off until `begin`: then `take` hands out what was noted, in order."""

    def __init__(self, nodes: Iterable[PrefixNode], max_waiting: int = MAX_WAITING) -> None:
        """`nodes`: of the cache, each behind the one before it."""
        self._nodes = nodes
        self._lock = threading.Lock()
        self._events: deque[BlockEvent] = deque()
        self._max_waiting = max_waiting
        self.is_on = self._is_lost = False

    # --- the cache's thread ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Note all blocks that are registered, after a `JournalRestart`, and from here on each change."""
        events: list[BlockEvent] = [
            JournalRestart(),
            *map(_stored, (node for node in self._nodes if max(node.slots) != NO_SLOT)),
        ]
        with self._lock:
            self._events = deque(events)
            self.is_on, self._is_lost = True, False

    def store(self, stored: Mapping[PrefixNode, Sequence[int]]) -> None:
        """These nodes have a slot now in these groups, in which they had none."""
        if self.is_on and stored:
            self._add([_stored_in(node, tuple(groups)) for node, groups in stored.items()])

    def drop(self, identity: bytes, groups: Iterable[int]) -> None:
        """This block has no slot in these groups any more."""
        if self.is_on:
            self._add([BlockDropped(identity, tuple(groups))])

    # --- any thread -----------------------------------------------------------------------------------------

    def end(self) -> None:
        """Note nothing more, and forget what was not taken."""
        with self._lock:
            self._events.clear()
            self.is_on = False

    def take(self, most: int) -> list[BlockEvent]:
        """The next events, fewer than `most` if there are no more."""
        with self._lock:
            return [self._events.popleft() for _ in range(min(most, len(self._events)))]

    @property
    def is_lost(self) -> bool:
        """Whether events were thrown away; only a `begin` makes it whole again."""
        return self._is_lost

    def _add(self, events: Sequence[BlockEvent]) -> None:
        with self._lock:
            if not self.is_on:
                return
            if len(self._events) + len(events) > self._max_waiting:
                self._events.clear()
                self.is_on, self._is_lost = False, True
            else:
                self._events.extend(events)


def _stored(node: PrefixNode) -> BlockStored:
    return _stored_in(node, tuple(group for group, slot in enumerate(node.slots) if slot != NO_SLOT))


def _stored_in(node: PrefixNode, groups: tuple[int, ...]) -> BlockStored:
    parent = node.parent
    is_first = parent is None or parent.parent is None  # the root is no block
    return BlockStored(node.identity, groups, b"" if parent is None or is_first else parent.identity, node.tokens)
