from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.oracles.cache_oracle import num_seats, tiny_layout

from disagg.cache.admission import peak_slots
from disagg.cache.budget import largest_model_len, num_seated, split_budget
from disagg.cache.errors import BudgetTooSmall
from disagg.cache.layout import LayerSpec, derive_layout

GIB = 1 << 30


def nbytes_of(layout, num_slots):
    return sum(n * size for n, size in zip(num_slots, layout.slot_nbytes, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    window=st.integers(1, 200), block_size=st.integers(1, 16), budget=st.integers(1, 600_000), batch=st.integers(1, 300)
)
def test_a_split_stays_in_budget_and_seats_a_longest_sequence_or_says_why_not(window, block_size, budget, batch):
    layout = tiny_layout(window, window, None, block_size=block_size, max_model_len=256)
    limits = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": batch}
    try:
        slots = split_budget(layout, nbytes=budget, **limits)
    except BudgetTooSmall:
        assert largest_model_len(layout, budget, max_model_len=256, max_num_batched_tokens=batch) < 256
        return
    assert nbytes_of(layout, slots) <= budget
    peaks = peak_slots(layout, total_tokens=256, history=0, step_tokens=min(256, batch))
    assert all(have - 2 >= need for have, need in zip(slots, peaks, strict=True))


def test_the_refusal_names_sizes_that_would_work():
    layout = tiny_layout(8, None, block_size=4, max_model_len=512)
    limits = {"max_model_len": 512, "max_num_batched_tokens": 64}
    with pytest.raises(BudgetTooSmall) as refusal:
        split_budget(layout, nbytes=5000, max_num_seqs=4, **limits)
    words = str(refusal.value).replace(",", " ").replace(";", " ").split()
    enough = int(words[words.index("least") + 1])
    longest = largest_model_len(layout, 5000, **limits)
    assert str(refusal.value).endswith(f"`--max-model-len` of at most {longest}")
    assert split_budget(layout, nbytes=enough, max_num_seqs=4, **limits)
    assert split_budget(layout, nbytes=5000, max_num_seqs=4, max_model_len=longest, max_num_batched_tokens=64)
    with pytest.raises(BudgetTooSmall):
        split_budget(layout, nbytes=enough - 1, max_num_seqs=4, **limits)


def test_memory_beyond_what_max_num_seqs_can_hold_is_left_alone():
    layout = tiny_layout(8, None, block_size=4, max_model_len=512)
    limits = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    assert split_budget(layout, nbytes=GIB, **limits) == split_budget(layout, nbytes=2 * GIB, **limits)


def test_windows_seat_the_sequences_that_the_published_example_seats():
    """70 GiB, 100 KiB per token windowed (W 1024), 40 KiB per token full, 8192 tokens: 168 with B = 2048, A = 8."""
    windowed = [LayerSpec(i, 1024, 0, 5, 128, "bfloat16", i) for i in range(40)]
    full = [LayerSpec(40 + i, None, 0, 5, 128, "bfloat16", 40 + i) for i in range(16)]
    layout = derive_layout([*windowed, *full], block_size=32, max_model_len=8192)
    assert layout.slot_nbytes == (32 * 100 * 1024, 32 * 40 * 1024)
    limits = {"max_model_len": 8192, "max_num_batched_tokens": 2048}
    slots = split_budget(layout, nbytes=70 * GIB, max_num_seqs=168, **limits)
    assert num_seats(layout, slots, **limits) == 168
    assert nbytes_of(layout, slots) <= 70 * GIB
    assert num_seats(layout, split_budget(layout, nbytes=70 * GIB, max_num_seqs=200, **limits), **limits) == 168


@settings(deadline=None, max_examples=80)
@given(
    window=st.integers(1, 200),
    block_size=st.integers(1, 16),
    budget=st.integers(1, 4_000_000),
    batch=st.integers(1, 300),
)
@example(window=16, block_size=4, budget=100_000, batch=64)
def test_a_worker_seats_as_many_as_the_plan_says(window, block_size, budget, batch):
    """`num_seated` of a budget, whatever `max_num_seqs` beyond it asks for: the rest of it is less than a seat."""
    layout = tiny_layout(window, window, None, block_size=block_size, max_model_len=256)
    limits = {"max_model_len": 256, "max_num_batched_tokens": batch}
    planned = num_seated(layout, budget, **limits)
    for most in (planned, planned + 1, 3 * planned) if planned else ():
        slots = split_budget(layout, nbytes=budget, max_num_seqs=most, **limits)
        assert num_seats(layout, slots, **limits) == planned
        assert nbytes_of(layout, slots) <= budget


def test_what_is_left_beyond_whole_seats_is_used_to_the_last_slot():
    layout = tiny_layout(24, 24, 24, None, block_size=8, max_model_len=128)
    limits = {"max_model_len": 128, "max_num_batched_tokens": 37}
    one, two = (split_budget(layout, nbytes=GIB, max_num_seqs=count, **limits) for count in (1, 2))
    for budget in range(nbytes_of(layout, one), nbytes_of(layout, two)):
        slots = split_budget(layout, nbytes=budget, max_num_seqs=4, **limits)
        assert 0 <= budget - nbytes_of(layout, slots) < min(layout.slot_nbytes)
        assert num_seats(layout, slots, **limits) == 1


def test_a_model_without_kv_needs_no_budget():
    assert split_budget(tiny_layout(), nbytes=0, max_model_len=8, max_num_seqs=1, max_num_batched_tokens=8) == ()
