"""What settings leave for kept prefixes: where the sentence appears, the engine loses every prefix."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import HASHER, TestedEngine, greedy, key, prompt_of
from support.oracles.cache_oracle import tiny_layout

from disagg.cache.layout import CacheLayout
from disagg.engine.commands import Serve
from disagg.engine.reuse_words import UNBOUNDED_NBYTES, CacheSize, advice, room_in_words

LAYOUT = tiny_layout(40, None, block_size=4, max_model_len=200)
UNEQUAL = tiny_layout(6, 6, None, block_size=4, num_sink_tokens=3, max_model_len=200)
"""Windowed layers in a pool of their own, and a full one."""


def size_of(max_num_seqs: int, *, batched: int = 16, step: int | None = None) -> CacheSize:
    return CacheSize(
        max_model_len=200, max_num_seqs=max_num_seqs, max_num_batched_tokens=batched, step_tokens=step or batched
    )


def tokens_saved_beside_another(layout: CacheLayout, size: CacheSize) -> int:
    """Prompt tokens that are not computed when a prompt comes again after another one of the maximum length."""
    engine = TestedEngine(layout=layout, num_slots=size.slots(layout, UNBOUNDED_NBYTES), hasher=HASHER)
    first, other = prompt_of(190), prompt_of(190, salt=1)
    engine.serve_all([Serve(key(1), first, greedy(4))])
    engine.serve_all([Serve(key(2), other, greedy(4))])
    before = engine.stats().prompt_tokens_computed
    engine.serve_all([Serve(key(3), first, greedy(4))])
    return len(first) - (engine.stats().prompt_tokens_computed - before)


@pytest.mark.parametrize("layout", [LAYOUT, UNEQUAL])
def test_where_the_sentence_comes_no_prefix_survives_another_prompt(layout: CacheLayout) -> None:
    assert advice(layout, size_of(1), UNBOUNDED_NBYTES) is not None
    assert tokens_saved_beside_another(layout, size_of(1)) == 0


def test_where_it_does_not_come_a_prefix_may_survive() -> None:
    assert advice(LAYOUT, size_of(8), UNBOUNDED_NBYTES) is None
    assert tokens_saved_beside_another(LAYOUT, size_of(8)) > 100


def test_the_room_is_said_per_pool() -> None:
    size = size_of(8)
    words = room_in_words(size.room(UNEQUAL, size.slots(UNEQUAL, UNBOUNDED_NBYTES)))
    assert re.fullmatch(r"\d+ of \d+ blocks of window-6\S*, \d+ of \d+ blocks of full", words), words


def test_a_worker_that_only_receives_keeps_more_than_one_that_computes_prompts() -> None:
    slots = size_of(2).slots(UNEQUAL, UNBOUNDED_NBYTES)
    computing, receiving = size_of(2).room(UNEQUAL, slots), size_of(2, step=1).room(UNEQUAL, slots)
    assert receiving[0].left > computing[0].left


@settings(deadline=None, max_examples=40)
@given(
    window=st.integers(1, 60),
    sinks=st.integers(0, 9),
    max_num_seqs=st.integers(1, 4),
    batched=st.integers(4, 64),
    share=st.floats(0.0, 1.0),
)
def test_what_the_sentence_asks_for_is_enough_and_asks_for_nothing_else(
    window: int, sinks: int, max_num_seqs: int, batched: int, share: float
) -> None:
    layout = tiny_layout(window, None, block_size=4, num_sink_tokens=sinks, max_model_len=200)
    size = size_of(max_num_seqs, batched=batched)
    floor, most = nbytes_of(layout, size_of(1, batched=batched)), nbytes_of(layout, size)
    nbytes = floor + int(share * (most - floor))
    sentence = advice(layout, size, nbytes)
    if sentence is None:
        assert all(room.keeps_a_prefix for room in size.room(layout, size.slots(layout, nbytes)))
        return
    seqs = re.search(r"`--max-num-seqs` (\d+) or more", sentence)
    memory = re.search(r"`--kv-cache-memory` of at least (\d+) bytes", sentence)
    assert seqs or memory
    raised = size_of(int(seqs[1]) if seqs else max_num_seqs, batched=batched)
    assert advice(layout, raised, int(memory[1]) if memory else nbytes) is None


def nbytes_of(layout: CacheLayout, size: CacheSize) -> int:
    slots = size.slots(layout, UNBOUNDED_NBYTES)
    return sum(count * nbytes for count, nbytes in zip(slots, layout.slot_nbytes, strict=True))
