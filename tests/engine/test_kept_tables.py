"""Tables kept from step to step say what tables made anew say, whatever sequences come, grow, go and come again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import LAYOUT

from disagg.cache import table as cache_table
from disagg.cache.cache import CachedSequence, KVCache
from disagg.cache.layout import CacheLayout, LayerSpec, derive_layout
from disagg.engine.run.graphs.rows import RowPlaces
from disagg.kernels.batch import NULL_SLOT, PagedBatch, QueryRun
from disagg.kernels.decode_plan import DecodePlan
from disagg.kernels.device_plan import device_plan
from disagg.kernels.table_rows import TableRows
from disagg.kernels.workspace import Workspace

MAX_ROWS, MAX_TOKENS = 6, 160


@dataclass
class World:
    """A cache whose sequences come and go, and all that is kept of their tables."""

    layout: CacheLayout = LAYOUT
    num_slots: tuple[int, ...] = (90, 180)
    live: list[CachedSequence] = field(default_factory=list)
    positions: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache, self.places, self.number = KVCache(self.layout, self.num_slots), RowPlaces(), 0
        self.kept = [TableRows() for _ in self.layout.groups]
        self.plans = [
            DecodePlan(
                block_size=self.layout.block_size,
                window=group.window,
                num_sink_tokens=group.num_sink_tokens,
                max_rows=MAX_ROWS,
                max_tokens=MAX_TOKENS,
                device=torch.device("cpu"),
                workspace=Workspace(),
            )
            for group in self.layout.groups
        ]

    def admit(self, length: int) -> None:
        """A prompt of `length` tokens is computed; its first token stands next."""
        self.number += 1
        sequence = self.cache.open(self.number)
        if self.cache.resize(sequence, capacity=length, history=0):
            assert self.cache.resize(sequence, capacity=length, history=length)
            self.positions[sequence.key] = length
            self.live.append(sequence)
        else:
            self.cache.close_sequence(sequence)

    def leave(self, which: int) -> None:
        self.cache.close_sequence(self.live.pop(which))

    def step(self, draw: random.Random) -> None:
        """All that find room for a token decode it, in any order."""
        batch = []
        for sequence in draw.sample(self.live, len(self.live)):
            at = self.positions[sequence.key]
            has_room = at < sequence.room or self.cache.resize(sequence, capacity=at + 1, history=at)
            if has_room and at < MAX_TOKENS - 1 and len(batch) < MAX_ROWS:
                batch.append(sequence)
                self.positions[sequence.key] += 1
        rows = self.places.place(batch)
        assert sorted(rows) == list(range(len(batch)))
        self.compare([sequence for _, sequence in sorted(zip(rows, batch, strict=True), key=lambda pair: pair[0])])

    def compare(self, batch: list[CachedSequence]) -> None:
        at = [self.positions[sequence.key] - 1 for sequence in batch]
        for number, group in enumerate(self.layout.groups):
            tables = [sequence.tables[number] for sequence in batch]
            self.plans[number].fill(tables, np.array(at, np.int64), MAX_ROWS)
            self.compare_plan(number, tables, at)
            places = self.kept[number].place(tables)
            flat = self.kept[number].entries.reshape(-1)
            for table, place in zip(tables, places.tolist(), strict=True):
                listed = table >= 0
                assert (flat[place : place + len(table)][listed] == table[listed]).all(), group.name

    def compare_plan(self, number: int, tables: list[np.ndarray], at: list[int]) -> None:
        group, size = self.layout.groups[number], self.layout.block_size
        runs = tuple(QueryRun(table.copy(), position, 1) for table, position in zip(tables, at, strict=True))
        batch = PagedBatch(runs, size, group.window, group.num_sink_tokens)
        anew, rows = device_plan(batch, torch.empty(2, 2, 1, size, 1), Workspace()), self.plans[number].rows(MAX_ROWS)
        count, width = anew.table.shape
        assert torch.equal(rows.table[:count, :width], anew.table), group.name
        assert (rows.table[:count, width:] == NULL_SLOT).all()
        assert (rows.table[count:] == NULL_SLOT).all()
        for name in ("runs", "write_slots", "write_offsets"):
            assert torch.equal(getattr(rows, name)[:count], getattr(anew, name)), (group.name, name)


def drive(world: World, draw: random.Random, num_moves: int) -> None:
    for _ in range(num_moves):
        chance = draw.random()
        if chance < 0.15:
            world.admit(draw.randint(1, 60))
        elif chance < 0.22 and world.live:
            world.leave(draw.randrange(len(world.live)))
        else:
            world.step(draw)


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False), st.integers(1, 150))
def test_kept_tables_equal_those_rebuilt_whole(draw: random.Random, num_moves: int) -> None:
    drive(World(), draw, num_moves)


def test_memory_given_to_another_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: as a pool of tables would do it."""
    shared = np.zeros(200, np.int32)

    def lengthened(table: np.ndarray, num_blocks: int) -> np.ndarray:
        shared[: len(table)], shared[len(table) : num_blocks] = table, -1
        return shared[:num_blocks]

    monkeypatch.setattr(cache_table, "_lengthened", lengthened)
    with pytest.raises(AssertionError):
        drive(World(), random.Random(1), 400)


def full_world(num_tokens: int) -> World:
    layout = derive_layout([LayerSpec(0, None, 0, 1, 2, "float32", 0)], block_size=4, max_model_len=MAX_TOKENS)
    world = World(layout, (200,))
    world.admit(num_tokens)
    return world


@pytest.mark.parametrize("num_tokens", [8, 96])
def test_a_step_sends_the_blocks_that_are_new_however_long_the_prompt(num_tokens: int) -> None:
    world, draw = full_world(num_tokens), random.Random(0)
    for _ in range(6):
        world.step(draw)
    sent, copied = world.plans[0].num_sent, world.kept[0].num_copied
    for _ in range(40):
        world.step(draw)
    assert world.plans[0].num_sent - sent == 10
    assert world.kept[0].num_copied - copied <= 10 + num_tokens // 4 + 12, "all of it once more when rows get wider"


def test_a_sequence_keeps_its_row_when_another_leaves() -> None:
    places, (a, b, c, d) = RowPlaces(), "abcd"
    assert places.place([a, b, c]) == [0, 1, 2]
    assert places.place([c, a]) == [1, 0], "the last takes the place that became free"
    assert places.place([c, a, d]) == [1, 0, 2]
    assert places.place([None, None, a]) == [1, 2, 0]
