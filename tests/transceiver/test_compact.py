"""Every vector of the design's block-alignment tables, and those that inference from list length gets wrong."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.token_walk import needed_blocks

from disagg.transceiver.compact import (
    HOLE,
    cached_blocks,
    cached_prefix,
    final_span,
    logical_mask,
    num_blocks,
    pair,
    resident_part,
    table_of_segments,
    table_of_suffix,
    token_offset,
    without_prefix,
)


def rows(pairs: np.ndarray) -> list[tuple[int, int]]:
    return [(source, destination) for _, source, destination in pairs.tolist()]


@pytest.mark.parametrize(
    ("source", "destination", "source_start", "destination_start", "expected"),
    [
        ([10, 11, 12], [20, 21, 22], 0, 0, [(10, 20), (11, 21), (12, 22)]),
        ([10, 11, 12, 13, 14], [20, 21, 22], 0, 128, [(12, 20), (13, 21), (14, 22)]),
        ([10, 11, 12], [20, 21, 22, 23], 64, 0, [(10, 21), (11, 22), (12, 23)]),
        ([10, 11, 12], [20, 21], 64, 128, [(11, 20), (12, 21)]),
        ([10, 11, 12], [20, 21, 22], 0, 192, []),
        ([10, 11, 12, 13], [20, 21, 22], 0, 128, [(12, 20), (13, 21)]),
    ],
)
def test_anchored_lists_pair_by_ordinal(
    source: list[int],
    destination: list[int],
    source_start: int,
    destination_start: int,
    expected: list[tuple[int, int]],
) -> None:
    end = source_start + 64 * len(source)
    a = table_of_segments([(source_start // 64, source)], end, 64)
    b = table_of_segments([(destination_start // 64, destination)], end, 64)
    assert rows(pair(a, b)) == expected


@pytest.mark.parametrize(
    ("num_cached_tokens", "prompt_len", "windows", "moved"),
    [
        (0, 256, (None, 64), (32, 8)),
        (64, 256, (None, None), (24, 24)),
        (24, 32, (16,), (1,)),
        (8, 32, (16,), (2,)),
        (8, 32, (None, 16, 32), (3, 2, 3)),
    ],
)
def test_one_cached_count_serves_every_group_without_clamping(
    num_cached_tokens: int, prompt_len: int, windows: tuple[int | None, ...], moved: tuple[int, ...]
) -> None:
    count = cached_blocks(num_cached_tokens, 8)
    assert count == num_cached_tokens // 8
    slots = np.arange(num_blocks(prompt_len, 8))
    for window, expected in zip(windows, moved, strict=True):
        kept = logical_mask(prompt_len, window, 0, 8) & (without_prefix(slots, count) != HOLE)
        assert kept.sum() == expected


def test_a_partly_cached_block_is_sent_again() -> None:
    assert [cached_blocks(tokens, 8) for tokens in (0, 7, 8, 15, 16)] == [0, 0, 1, 1, 2]


def kept_slots(
    slots: list[int], window: int | None, num_cached_tokens: int, *, prompt_len: int = 32, tpb: int = 8, spec: int = 0
) -> list[int]:
    table = table_of_suffix(slots, prompt_len=prompt_len, block_size=tpb, end=prompt_len + spec)
    table = without_prefix(table, cached_blocks(num_cached_tokens, tpb))
    return [slot for slot in table[logical_mask(prompt_len, window, 0, tpb)].tolist() if slot != HOLE]


@pytest.mark.parametrize(
    ("slots", "window", "cached", "expected"),
    [
        ([20, 21], 16, 0, [20, 21]),
        ([20, 21], 16, 16, [20, 21]),
        ([20, 21], 16, 8, [20, 21]),
        ([20, 21], 16, 24, [21]),
        ([20, 21], 16, 32, []),
        ([10, 11, 12], 24, 16, [11, 12]),
        ([10, 11, 12, 13], 32, 8, [11, 12, 13]),
        ([10, 11, 12, 13], 16, 0, [12, 13]),
        ([100, 101, 102, 103, 104], 16, 0, [102, 103]),
    ],
    ids=[
        "no cache",
        "cache entirely stale",
        "reuse inside stale",
        "cache one block into window",
        "cache covers window",
        "skip subtracts stale",
        "window covers prompt",
        "sender has not evicted",
        "oversized list",
    ],
)
def test_a_suffix_list_is_trimmed_by_window_and_cached_prefix(
    slots: list[int], window: int, cached: int, expected: list[int]
) -> None:
    assert kept_slots(slots, window, cached) == expected


@pytest.mark.parametrize("slots", [[100, 101, 102, 103, 104], [102, 103, 104]])
def test_a_speculative_tail_does_not_shift_the_blocks_before_it(slots: list[int]) -> None:
    assert kept_slots(slots, 16, 16, spec=8) == [102, 103]


@pytest.mark.parametrize(("prompt_len", "num_listed", "expected"), [(17, 4, 3), (17, 3, 3), (16, 3, 2)])
def test_extra_speculative_tokens_add_no_block(prompt_len: int, num_listed: int, expected: int) -> None:
    assert len(kept_slots(list(range(num_listed)), None, 0, prompt_len=prompt_len, spec=7)) == expected


@pytest.mark.parametrize("prompt_len", [1150, 1151])
def test_a_compacted_window_with_a_speculative_block_keeps_all_but_the_last(prompt_len: int) -> None:
    valid = logical_mask(prompt_len, 133, 0, 128).sum()
    slots = list(range(500, 500 + valid + 1))
    assert kept_slots(slots, 133, 0, prompt_len=prompt_len, tpb=128, spec=5) == slots[:-1]


@pytest.mark.parametrize(
    ("window", "num_source", "num_destination", "end", "expected"),
    [
        (None, 4, 4, 32, (0, 0)),
        (None, 4, 2, 32, (0, 16)),
        (None, 2, 4, 32, (16, 0)),
        (16, 2, 2, 32, (16, 16)),
        (24, 2, 3, 32, (16, 8)),
        (32, 4, 4, 32, (0, 0)),
        (None, 2, 2, 16, (0, 0)),
        (16, 0, 0, 16, (16, 16)),
    ],
)
def test_a_lists_offset_follows_from_its_length(
    window: int | None, num_source: int, num_destination: int, end: int, expected: tuple[int, int]
) -> None:
    assert (token_offset(num_source, end, 8), token_offset(num_destination, end, 8)) == expected


def test_unequal_suffixes_pair_where_they_overlap() -> None:
    source = table_of_suffix([10, 11], prompt_len=32, block_size=8)
    destination = table_of_suffix([20, 21, 22], prompt_len=32, block_size=8)
    assert rows(pair(source, destination, logical_mask(32, 24, 0, 8))) == [(10, 21), (11, 22)]


def test_a_list_longer_than_its_range_has_no_offset() -> None:
    with pytest.raises(ValueError, match="5 blocks listed for 32 tokens, at most 4"):
        token_offset(5, 32, 8)


@pytest.mark.parametrize(
    ("start", "end", "num_reused", "expected"),
    [
        (0, 6, 0, (0, 1)),
        (6, 12, 0, (1, 3)),
        (12, 32, 0, (3, 8)),
        (0, 2, 0, (0, 0)),
        (5, 7, 0, (1, 1)),
        (6, 14, 6, (0, 3)),
        (12, 24, 12, (0, 6)),
        (24, 32, 12, (6, 8)),
        (12, 32, 12, (0, 8)),
    ],
)
def test_chunks_finish_whole_blocks_once(start: int, end: int, num_reused: int, expected: tuple[int, int]) -> None:
    span = final_span(start, end, 32, num_reused, 4)
    assert (span.start, span.stop) == expected


@given(st.integers(1, 60), st.integers(1, 9), st.data())
def test_chunk_spans_tile_the_prompt(prompt_len: int, block_size: int, data: st.DataObject) -> None:
    reused = data.draw(st.integers(0, prompt_len - 1))
    cuts = sorted(data.draw(st.sets(st.integers(reused + 1, prompt_len)))) or [prompt_len]
    edges = [reused, *cuts] if cuts[-1] == prompt_len else [reused, *cuts, prompt_len]
    spans = [final_span(a, b, prompt_len, reused, block_size) for a, b in pairwise(edges)]
    assert [o for span in spans for o in span] == list(range(num_blocks(prompt_len, block_size)))


@pytest.mark.parametrize(
    ("slots", "num_resident", "span", "expected"),
    [
        ((104, 105, 106, 107), 8, range(4), ()),
        ((104, 105, 106, 107), 8, range(4, 8), (104, 105, 106, 107)),
        ((1, 2, 3), 3, range(4, 8), ()),
        ((104, 105, 106, 107), 8, range(5, 7), (105, 106)),
    ],
)
def test_a_whole_prompt_list_is_projected_on_a_chunk(
    slots: tuple[int, ...], num_resident: int, span: range, expected: tuple[int, ...]
) -> None:
    assert resident_part(slots, num_resident, span) == expected


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ([10, 11, 12, 13], [-1, -1, 22, 23], [(12, 22), (13, 23)]),
        ([-1, 11, 12, -1], [20, 21, 22, 23], [(11, 21), (12, 22)]),
        ([10, -1, 12, 13], [-1, 21, 22, -1], [(12, 22)]),
        ([100, 101], [-1, 201], [(101, 201)]),
        ([-1, -1, 12, 13], [-1, 21, 22, 23], [(12, 22), (13, 23)]),
    ],
)
def test_tables_pair_where_both_hold_a_slot(
    source: list[int], destination: list[int], expected: list[tuple[int, int]]
) -> None:
    assert rows(pair(np.array(source), np.array(destination))) == expected


def test_tables_of_different_prompts_do_not_pair() -> None:
    with pytest.raises(ValueError, match="tables of 2 and 3 blocks"):
        pair(np.array([1, 2]), np.array([1, 2, 3]))


def test_a_sender_that_has_not_evicted_sends_only_the_logical_window() -> None:
    slots = np.arange(2048)
    assert len(pair(slots, slots, logical_mask(128 * 1024, 4096, 0, 64))) in (64, 65)


def test_a_receivers_speculative_block_does_not_shift_a_windowed_list() -> None:
    """P 139, W 3, 8 tokens per block: by length alone source ordinal 17 went to destination ordinal 18."""
    source = table_of_suffix([117], prompt_len=139, block_size=8)
    destination = table_of_suffix([217, 218], prompt_len=139, block_size=8, end=139 + 8)
    assert pair(source, destination, logical_mask(139, 3, 0, 8)).tolist() == [[17, 117, 217]]


def test_sinks_need_an_anchor_and_survive_with_one() -> None:
    """P 1024, W 128, S 32: five blocks are resident, which no length can tell from `the last four`."""
    with pytest.raises(ValueError, match="32 sink tokens needs an anchor"):
        table_of_suffix([1, 2, 3, 4, 5], prompt_len=1024, block_size=32, num_sink_tokens=32)
    table = table_of_segments([(0, [50]), (28, [51, 52, 53, 54])], 1024, 32)
    mask = logical_mask(1024, 128, 32, 32)
    assert pair(table, table, mask)[:, 0].tolist() == [0, 28, 29, 30, 31]


@given(st.integers(1, 60), st.none() | st.integers(1, 40), st.integers(0, 20), st.integers(1, 9))
def test_the_logical_mask_is_what_token_walking_finds(
    prompt_len: int, window: int | None, num_sink_tokens: int, block_size: int
) -> None:
    mask = logical_mask(prompt_len, window, num_sink_tokens, block_size)
    assert set(np.flatnonzero(mask)) == needed_blocks(prompt_len, window, block_size, num_sink_tokens)


@pytest.mark.parametrize(
    ("held", "needed", "expected"),
    [
        ([], [2, 3], 0),
        ([2], [2, 3], 3),
        ([3, 2], [2, 3], 4),
        ([3], [2, 3], None),
        ([0, 1, 2], [0, 1], None),
        ([5], [0], None),
    ],
)
def test_a_held_set_is_a_count_only_when_it_is_a_prefix(
    held: list[int], needed: list[int], expected: int | None
) -> None:
    assert cached_prefix(np.array(held, dtype=np.int64), np.array(needed, dtype=np.int64)) == expected
