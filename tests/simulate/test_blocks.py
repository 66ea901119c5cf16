"""The simulator's prefix cache against the product's, on one schedule."""

from __future__ import annotations

import random

import pytest

from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout, LayerSpec, derive_layout
from disagg.simulate.blocks import BlockStore
from disagg.simulate.geometry import KvGeometry

BLOCK = 4
PLENTY = 4096


def layout_of(*windows: int | None) -> CacheLayout:
    layers = [LayerSpec(i, window, 0, 1, 1 + i, "int8", i) for i, window in enumerate(windows)]
    return derive_layout(layers, block_size=BLOCK, max_model_len=1 << 12)


class BothCaches:
    """One prompt after another goes through the product's cache and the simulator's; a block is one number repeated."""

    def __init__(self, layout: CacheLayout, num_slots: int) -> None:
        slots = [num_slots] * layout.num_pools
        self.real = KVCache(layout, slots, hasher=BlockHasher(b"key", "model"))
        self.store = BlockStore(KvGeometry(layout, BLOCK), slots)
        self._number = 0

    def compute(self, blocks: list[int], prompt_len: int) -> tuple[int, int]:
        """Blocks reused by either; afterwards the prompt is released."""
        self._number += 1
        tokens = self._tokens(blocks, prompt_len)
        sequence = self.real.open(self._number)
        reused = self.real.reuse_prefix(sequence, tokens)
        assert self.real.resize(sequence, capacity=prompt_len, history=reused)
        self.real.commit(sequence, tokens[reused:])
        assert self.real.resize(sequence, capacity=prompt_len, history=prompt_len)
        self.real.close_sequence(sequence)
        mine = self.store.usable(blocks, prompt_len)
        assert self.store.try_promise(self._number, self._peaks(prompt_len))
        held = self.store.begin(blocks, self.store.read_at(mine))
        self.store.register(held, mine, len(blocks), prompt_len)
        self.store.promises.release(self._number)
        self.store.release(held)
        return reused // BLOCK, mine

    def held(self, blocks: list[int], prompt_len: int) -> tuple[list[list[int]], list[list[int]]]:
        """Per group, ordinals that either would not have to receive."""
        self._number += 1
        sequence = self.real.open(self._number)
        real = self.real.reserve(sequence, self._tokens(blocks, prompt_len), capacity=prompt_len + 1)
        assert real is not None
        self.real.close_sequence(sequence)
        mine = self.store.held(blocks, prompt_len)
        return [some.tolist() for some in real], [[o for a, b in runs for o in range(a, b)] for runs in mine]

    def _tokens(self, blocks: list[int], prompt_len: int) -> list[int]:
        rest = prompt_len - len(blocks) * BLOCK
        return [block for block in blocks for _ in range(BLOCK)] + [1 << 40] * rest

    def _peaks(self, prompt_len: int) -> tuple[int, ...]:
        geometry = KvGeometry(self.real.layout, BLOCK)
        return geometry.peaks(prompt_len, 0, prompt_len)


def prompts(seed: int, count: int) -> list[tuple[list[int], int]]:
    """Prompts that share beginnings: each goes on from a part of one before it. Names stand for whole prefixes."""
    draw, found, fresh = random.Random(seed), [([0], BLOCK + 1)], 1
    for _ in range(count):
        before, _ = draw.choice(found[-8:])
        blocks = before[: draw.randint(0, len(before))]
        for _ in range(draw.randint(0, 6)):
            blocks = [*blocks, fresh]
            fresh += 1
        found.append((blocks, len(blocks) * BLOCK + draw.randint(1, BLOCK - 1)))
    return found


@pytest.mark.parametrize("windows", [(None,), (7,), (None, 9), (5, 17, None)])
@pytest.mark.parametrize("seed", range(4))
def test_with_room_for_all_the_same_blocks_are_reused_and_received(windows: tuple[int | None, ...], seed: int) -> None:
    both = BothCaches(layout_of(*windows), PLENTY)
    total = 0
    for blocks, prompt_len in prompts(seed, 60):
        real, mine = both.held(blocks, prompt_len)
        assert mine == real
        reused, found = both.compute(blocks, prompt_len)
        assert found == reused
        total += found
        both.store.check_invariants()
    assert total > 30, "the schedule reused nothing, so it showed nothing"
    both.real.close()


@pytest.mark.parametrize("seed", range(4))
def test_full_attention_forgets_the_same_blocks_when_room_is_short(seed: int) -> None:
    both = BothCaches(layout_of(None), 40)
    total = evicted = 0
    for blocks, prompt_len in prompts(seed, 80):
        if len(blocks) > 30:
            continue
        reused, found = both.compute(blocks, prompt_len)
        total += reused != found
        both.store.check_invariants()
        evicted = both.store.num_evicted
    assert evicted > 20, "room was never short"
    assert total <= 8, "promises of whole prompts evict a little earlier than slots that are taken, and no more"
    both.real.close()


def test_what_a_running_request_refers_to_stays_and_what_none_does_goes_oldest_and_deepest_first() -> None:
    layout = layout_of(None)
    store = BlockStore(KvGeometry(layout, BLOCK), [2 + 6])
    told: list[tuple[tuple[int, ...], bool]] = []
    store.tell = lambda group, blocks, kept: told.append((tuple(blocks), kept))
    first = store.begin([1, 2, 3], store.read_at(0))
    assert store.try_promise("first", (3,))
    store.register(first, 0, 3, 12)
    store.promises.release("first")
    store.release(first)
    assert store.try_promise("second", (4,))  # leaves two of six: the deepest block goes
    assert store.usable([1, 2, 3], 13) == 2
    assert told == [((1, 2, 3), True), ((3,), False)]
    again = store.begin([1, 2], store.read_at(2))
    store.check_invariants()
    assert not store.try_promise("third", (3,))
    store.release(again)
    assert store.resident(0) == (2, 1)


def test_a_block_that_lacks_in_a_window_ends_the_prefix_before_it() -> None:
    store = BlockStore(KvGeometry(layout_of(None, 6), BLOCK), [PLENTY, PLENTY])
    store.take_in([1, 2, 3], 12)  # the window of 6 has blocks 2 and 3 alone
    assert store.usable([1, 2, 3], 13) == 3
    assert store.usable([1, 2, 9], 13) == 0
    assert store.held([1, 2, 3], 12) == (((0, 3),), ((1, 3),))


def test_without_reuse_nothing_is_kept() -> None:
    store = BlockStore(KvGeometry(layout_of(None), BLOCK), [PLENTY], reuses=False)
    store.take_in([1, 2], 8)
    assert store.usable([1, 2], 9) == 0


def test_a_trace_whose_blocks_are_no_multiple_of_the_caches_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 6 tokens and the cache of 4"):
        KvGeometry(layout_of(None), 6)
