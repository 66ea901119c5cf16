"""The router's index of blocks, told by simulated workers: `disagg.router.index`, with names that are numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from disagg.router.index.block_index import BlockIndex, GroupSpan
from disagg.router.index.remote import MAX_HOLDERS
from disagg.simulate.handoff import Ground
from disagg.simulate.records import incarnation_of
from disagg.simulate.worker import SimulatedWorker
from disagg.transceiver.wire.messages.blocks import (
    BLOCK_NAME_NBYTES,
    DROPPED,
    MAX_EVENTS,
    NUM_KINDS,
    STORED_NEXT,
    BlockEvents,
)
from disagg.worker.block_news import TELL_S

SWEEPS: Final = 4
"""Pieces of housekeeping after each message, as the index's process does some whenever it has nothing else to do."""


class IndexOfBlocks:
    """What the router knows of prefix caches: as old as a worker's news are."""

    def __init__(self, ground: Ground, workers: Sequence[SimulatedWorker]) -> None:
        groups = ground.geometry.layout.groups
        self._ground, self._unit = ground, ground.geometry.unit
        self._index = BlockIndex([GroupSpan(group.window, group.num_sink_tokens) for group in groups])
        self._sets = tuple((number,) for number in range(len(groups)))
        self._told = [0] * len(workers)
        self._pending: list[list[tuple[int, Sequence[int], bool]]] = [[] for _ in workers]
        for worker in workers:
            self._index.add(incarnation_of(worker.number), self._unit)
            self._tell(worker.number, b"", b"")
            worker.store.tell = self._listener(worker.number)

    def who_holds(self, blocks: Sequence[int], prompt_len: int) -> dict[str, int]:
        """By incarnation, from how many tokens of the prompt it could go on: few workers, those with the most."""
        chain = map(name_of, blocks[: (prompt_len - 1) // self._unit])
        return {one.incarnation: one.num_tokens for one in self._index.holders(chain, self._unit, MAX_HOLDERS)}

    def _listener(self, number: int) -> Callable[[int, Sequence[int], bool], None]:
        pending = self._pending[number]

        def tell(group: int, blocks: Sequence[int], kept: bool) -> None:
            if not pending:
                self._ground.agenda.after(TELL_S, lambda: self._publish(number))
            pending.append((group, blocks, kept))

        return tell

    def _publish(self, number: int) -> None:
        """All that a worker registered and dropped since it told last, in order, in as many messages as it takes."""
        pending, ops, names = self._pending[number], bytearray(), bytearray()
        for group, blocks, kept in pending:
            ops += bytes([NUM_KINDS * group + (STORED_NEXT if kept else DROPPED)]) * len(blocks)
            names += b"".join(map(name_of, blocks))
        pending.clear()
        for start in range(0, len(ops), MAX_EVENTS):
            end = start + MAX_EVENTS
            self._tell(number, bytes(ops[start:end]), bytes(names[BLOCK_NAME_NBYTES * start : BLOCK_NAME_NBYTES * end]))

    def _tell(self, number: int, ops: bytes, names: bytes) -> None:
        sequence, self._told[number] = self._told[number], self._told[number] + 1
        events = BlockEvents(
            incarnation_of(number), sequence, self._unit, self._sets, ops, names, is_reset=sequence == 0
        )
        assert self._index.take(events), "a message was missed"
        for _ in range(SWEEPS):
            if not self._index.sweep():
                break


def name_of(block: int) -> bytes:
    """An identity for a block of a trace."""
    return block.to_bytes(BLOCK_NAME_NBYTES, "little")
