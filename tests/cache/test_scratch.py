from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.oracles.cache_oracle import outdated_blocks, resident_blocks

from disagg.cache.admission import peak_slots
from disagg.cache.budget import split_budget
from disagg.cache.cache import KVCache
from disagg.cache.layout import CacheLayout, LayerSpec, derive_layout
from disagg.cache.scratch import Scratch, num_scratch_slots, page_table, scratch_range
from disagg.cache.table import HOLE


def uniform(num_layers: int, window: int, block_size: int, sinks: int = 0, *, uses_scratch: bool = True) -> CacheLayout:
    layers = [LayerSpec(i, window, sinks, 1, 2, "float32", i) for i in range(num_layers)]
    return derive_layout(layers, block_size=block_size, max_model_len=1 << 20, uses_scratch=uses_scratch)


# --- the published vectors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("uses_scratch", "sinks", "peak"), [(True, 0, 5), (False, 0, 32), (True, 32, 6)])
def test_a_prompt_of_1024_tokens_over_32_layers_holds(uses_scratch: bool, sinks: int, peak: int) -> None:
    layout = uniform(32, 128, 32, sinks, uses_scratch=uses_scratch)
    cache = KVCache(layout, (2 + peak,))
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=1024, history=0, scratch_until=1024)
    assert cache.usage()[0].num_used == peak
    cache.check_invariants()
    assert cache.resize(sequence, capacity=1024, history=1024)
    assert (cache.usage()[0].num_used, cache.usage()[0].peak_used) == (4 + (sinks > 0), peak)
    assert cache.num_scratch == (0,)
    cache.close()


@pytest.mark.parametrize(
    ("history", "capacity", "window", "sinks", "layers", "expected", "slots", "new"),
    [
        (0, 1024, 128, 0, 32, range(28), 1, 4),
        (0, 1024, 128, 32, 32, range(1, 28), 1, 5),
        (0, 256, 32, 0, 8, range(7), 1, 1),
        (0, 256, 64, 0, 1, range(6), 6, 2),
        (256, 352, 64, 0, 1, range(8, 9), 1, 2),
        (0, 256, 256, 0, 8, range(0), 0, 8),
        (256, 352, 256, 0, 8, range(8, 8), 0, 3),
        (0, 512, 128, 32, 16, range(1, 12), 1, 5),
        (500, 1012, 128, 0, 32, range(16, 27), 1, 5),
    ],
)
def test_scratch_ranges_of_known_steps(
    history: int, capacity: int, window: int, sinks: int, layers: int, expected: range, slots: int, new: int
) -> None:
    found = scratch_range(history, capacity, capacity, window, sinks, 32)
    assert list(found) == list(expected)
    assert num_scratch_slots(len(found), layers) == slots
    assert len(range(-(-history // 32), -(-capacity // 32))) - len(found) == new


@settings(deadline=None, max_examples=150)
@given(
    history=st.integers(0, 60),
    step=st.integers(1, 60),
    earlier=st.integers(0, 70),
    window=st.integers(1, 30),
    sinks=st.integers(0, 9),
    block_size=st.integers(1, 6),
)
def test_a_range_is_what_a_token_walk_finds(
    history: int, step: int, earlier: int, window: int, sinks: int, block_size: int
) -> None:
    capacity = history + step
    until = max(0, capacity - earlier)
    found = scratch_range(history, capacity, until, window, sinks, block_size)
    (group,) = uniform(1, window, block_size, sinks).groups
    expected = outdated_blocks(history, capacity, until, group, block_size)
    if window == 1:  # allowed: one block more is kept, never less
        assert set(found) <= set(expected)
    else:
        assert list(found) == expected


# --- where they lie -------------------------------------------------------------------------------------------


def test_every_block_of_the_running_layer_has_a_page_of_its_own() -> None:
    scratch = Scratch(first=1, num_blocks=5, slots=(9, 4))
    table = np.array([7, HOLE, HOLE, HOLE, HOLE, HOLE, 8], dtype=np.int32)
    assert page_table(table, scratch, 3, 0).tolist() == [21, 27, 28, 29, 12, 13, 24]
    assert page_table(table, scratch, 3, 2).tolist() == [23, 27, 28, 29, 12, 13, 26]
    assert page_table(table, None, 3, 1).tolist() == [22, -1, -1, -1, -1, -1, 25]


def mixed_layout(block_size: int = 4) -> CacheLayout:
    """Three windowed groups of 4, 2 and 1 layers with 1, 2 and 4 heads, and a full one: slots of equal bytes."""
    shapes = [(6, 1, 4), (9, 2, 2), (5, 4, 1), (None, 4, 1)]
    layers: list[LayerSpec] = []
    for window, heads, count in shapes:
        layers += [LayerSpec(len(layers) + i, window, 0, heads, 2, "float32", len(layers) + i) for i in range(count)]
    layout = derive_layout(layers, block_size=block_size, max_model_len=1 << 20, uses_scratch=True)
    assert (layout.num_groups, layout.num_pools) == (4, 1)
    return layout


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60)), min_size=1, max_size=4))
def test_groups_that_cut_a_slot_differently_never_collide(steps: list[tuple[int, int]]) -> None:
    """At no moment do two blocks, of any sequence, group or layer that is kept, lie on the same byte."""
    layout = mixed_layout()
    cache = KVCache(layout, (2 + 400,))
    sequences = []
    for number, (history, count) in enumerate(steps):
        sequences.append(cache.open(number))
        assert cache.resize(sequences[-1], capacity=history, history=history)
        capacity = history + count
        assert cache.resize(sequences[-1], capacity=capacity, history=history, scratch_until=capacity)
    cache.check_invariants()
    for running in range(layout.num_groups):
        for position in range(len(layout.groups[running].layers)):
            check_no_byte_is_shared(cache, sequences, running, position)
    for sequence in sequences:
        cache.close_sequence(sequence)
    assert cache.pools[0].num_used == 0
    cache.close()


def check_no_byte_is_shared(cache: KVCache, sequences: list, running: int, position: int) -> None:
    """While the layer at `position` of group `running` runs: its scratch pages, and every kept page of all layers."""
    layout, taken = cache.layout, np.zeros(cache.pools[0].memory.numel(), dtype=np.int8)
    for sequence in sequences:
        for number, group in enumerate(layout.groups):
            num_layers = len(group.layers)
            width = layout.slot_nbytes[0] // num_layers
            for place in range(num_layers):
                is_running = (number, place) == (running, position)
                scratch = sequence.scratch[number] if is_running and sequence.scratch else None
                pages = page_table(sequence.tables[number], scratch, num_layers, place)
                for page in pages[pages >= 0].tolist():
                    taken[page * width : (page + 1) * width] += 1
    assert taken.max(initial=0) <= 1, "two blocks lie on the same byte"


def test_the_upstream_formula_collides_where_ours_does_not() -> None:
    """Negative control: buffers 1, 2, 2 in one slot (scale 5), rotated by t = q * u: block 2's V is on block 0's K."""

    def upstream(block: int, role: int, util: int, offset: int, scale: int) -> int:
        t = block * util
        return t // scale * scale + ((t % scale) + offset + role) % scale

    places = [upstream(block, role, 2, 1, 5) for block in range(3) for role in range(2)]
    assert len(set(places)) < len(places)
    ours = Scratch(0, 3, (0, 1)).pages(2)
    assert len(set(ours.tolist())) == 3


# --- where it is legal ----------------------------------------------------------------------------------------


def sharing(*producers: int, window: int | None = 8) -> CacheLayout:
    layers = [LayerSpec(i, window, 0, 1, 2, "float32", producer) for i, producer in enumerate(producers)]
    return derive_layout(layers, block_size=4, max_model_len=1 << 20, uses_scratch=True)


@pytest.mark.parametrize(
    ("producers", "pages"),
    [
        ((0, 1, 2), 3),
        ((0, 1, 2, 2, 2), 3),  # only the last writer is read by others
        ((0, 1, 2, 1), 0),  # layer 2 would have written over what layer 3 reads
        ((0, 0), 1),
        ((0, 0, 2), 0),
    ],
)
def test_scratch_is_legal_where_the_last_writer_alone_is_read_by_others(producers: tuple[int, ...], pages: int) -> None:
    assert sharing(*producers).scratch_pages(0) == pages
    assert sharing(*producers, window=None).scratch_pages(0) == 0
    layers = [LayerSpec(i, 8, 0, 1, 2, "float32", producer) for i, producer in enumerate(producers)]
    assert derive_layout(layers, block_size=4, max_model_len=1 << 20).scratch_pages(0) == 0


# --- any order ------------------------------------------------------------------------------------------------


class ScratchMachine(RuleBasedStateMachine):
    """Open, step with and without scratch, finish the step, abort in it; pools too small for some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = mixed_layout()
        self.cache = KVCache(self.layout, (2 + 30,))
        self.sequences: list = []
        self.num_opened = 0

    @rule()
    def open(self) -> None:
        self.num_opened += 1
        self.sequences.append(self.cache.open(self.num_opened))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(1, 50), back=st.integers(0, 60))
    def step(self, data: st.DataObject, count: int, back: int) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        history = data.draw(st.sampled_from([sequence.history, sequence.capacity]))
        capacity = history + count
        until = max(0, capacity - back)
        before, others = self.snapshot(), self.snapshot(without=sequence)
        done = self.cache.resize(sequence, capacity=capacity, history=history, scratch_until=until)
        assert self.snapshot(without=sequence)[0] == others[0]
        if not done:
            assert self.snapshot() == before
            assert (
                sum(self.held_by(s) for s in self.sequences if s is not sequence)
                + sum(self.expected(capacity, history, until))
                > self.cache.pools[0].num_slots - 2
            )
        else:
            assert (sequence.capacity, sequence.history) == (capacity, history)
            assert self.held_by(sequence) == sum(self.expected(capacity, history, until))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish_step(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        assert self.cache.resize(sequence, capacity=sequence.capacity, history=sequence.capacity)
        assert not sequence.scratch

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), wipe=st.booleans())
    def abort(self, data: st.DataObject, wipe: bool) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.cache.close_sequence(sequence, wipe=wipe)

    def expected(self, capacity: int, history: int, until: int) -> list[int]:
        """Slots per group, by walking tokens: normal blocks, and the fewest slots that hold the scratch blocks."""
        counts = []
        for group in self.layout.groups:
            live = resident_blocks(capacity, history, group, 4)
            scratch = set()
            if group.window is not None and until:
                scratch = set(outdated_blocks(history, capacity, until, group, 4))
            counts.append(len(live - scratch) - (-len(scratch & live) // len(group.layers)))
        return counts

    def held_by(self, sequence: object) -> int:
        tables = sum(int((table != HOLE).sum()) for table in sequence.tables)  # type: ignore[attr-defined]
        return tables + sum(len(s.slots) for s in sequence.scratch if s)  # type: ignore[attr-defined]

    def snapshot(self, *, without: object = None) -> tuple[object, ...]:
        held = [s for s in self.sequences if s is not without]
        tables = [([t.tolist() for t in s.tables], s.scratch, s.capacity, s.history) for s in held]
        return tables, self.cache.usage(), self.cache.pools[0].generations.tolist()

    @invariant()
    def nothing_leaks(self) -> None:
        self.cache.check_invariants()
        assert sum(self.held_by(s) for s in self.sequences) == self.cache.pools[0].num_used

    def teardown(self) -> None:
        for sequence in self.sequences:
            self.cache.close_sequence(sequence)
        self.cache.check_invariants()
        assert self.cache.pools[0].num_used == 0
        self.cache.close()


TestScratchMachine = ScratchMachine.TestCase
TestScratchMachine.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("fault", ["leak", "wrong blocks"])
def test_check_invariants_notices(fault: str) -> None:
    cache = KVCache(uniform(4, 8, 4), (2 + 30,))
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=60, history=0, scratch_until=60)
    cache.check_invariants()
    (scratch,) = sequence.scratch
    assert scratch is not None
    lost = Scratch(scratch.first, scratch.num_blocks, scratch.slots[:-1])
    sequence.scratch = (lost if fault == "leak" else Scratch(scratch.first, scratch.num_blocks - 1, scratch.slots),)
    with pytest.raises(AssertionError):
        cache.check_invariants()
    cache.close()


# --- what is promised -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=120)
@given(
    chunks=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    window=st.integers(1, 30),
    sinks=st.integers(0, 7),
    block_size=st.integers(1, 6),
    num_layers=st.integers(1, 5),
    keeps_match=st.booleans(),
)
@example(chunks=[1, 6], window=2, sinks=0, block_size=2, num_layers=5, keeps_match=True)
def test_no_chunked_prefill_holds_more_than_the_promised_peak(
    chunks: list[int], window: int, sinks: int, block_size: int, num_layers: int, keeps_match: bool
) -> None:
    """`keeps_match`: the last chunk leaves what the same prompt, asked again, would begin with out of scratch."""
    layout = uniform(num_layers, window, block_size, sinks)
    cache = KVCache(layout, (2 + 800,))
    sequence, history = cache.open("a"), 0
    matched = (sum(chunks) - 1) // block_size * block_size
    for count in chunks:
        until = min(history + count, matched) if keeps_match else history + count
        assert cache.resize(sequence, capacity=history + count, history=history, scratch_until=until)
        history += count
    (promised,) = peak_slots(layout, total_tokens=sum(chunks), history=0, step_tokens=max(chunks))
    assert cache.usage()[0].peak_used <= promised
    without = uniform(num_layers, window, block_size, sinks, uses_scratch=False)
    assert promised <= peak_slots(without, total_tokens=sum(chunks), history=0, step_tokens=max(chunks))[0]
    cache.close()


def test_a_budget_needs_less_for_the_step_when_it_has_scratch() -> None:
    limits = {"max_model_len": 8192, "max_num_batched_tokens": 2048}
    few, many = (
        split_budget(uniform(32, 128, 32, uses_scratch=on), nbytes=1 << 40, max_num_seqs=1, **limits)[0] - 2
        for on in (True, False)
    )
    assert (few, many) == (13, 70)
    layout = uniform(32, 128, 32)
    (slots,) = split_budget(layout, nbytes=40 * layout.slot_nbytes[0], max_num_seqs=64, **limits)
    assert slots - 2 >= peak_slots(layout, total_tokens=8192, history=0, step_tokens=2048)[0]
