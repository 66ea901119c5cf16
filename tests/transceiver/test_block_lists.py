"""Every vector of the design's block-alignment tables, and those that inference from list length gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.transceiver.layout.block_lists import (
    cached_blocks,
    cached_prefix,
    final_span,
    num_blocks,
    table_of_suffix,
    token_offset,
)
from disagg.transceiver.layout.required import needed_units
from disagg.transceiver.library.plan_copies import Anchored, BlockList, End, Have, Suffix, transfer_plan
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics


def geometry(block_size: int, windows: Sequence[int | None], num_sink_tokens: int) -> Geometry:
    groups = tuple(GroupSemantics(window, num_sink_tokens, 1, 1, (layer,)) for layer, window in enumerate(windows))
    return Geometry(block_size, "float32", groups, ())


def pairs(
    source: BlockList,
    destination: BlockList,
    prompt_len: int,
    block_size: int,
    window: int | None = None,
    *,
    num_sink_tokens: int = 0,
    cached: int = 0,
    tokens: range | None = None,
    num_reused: int = 0,
) -> list[tuple[int, int]]:
    """(source slot, destination slot) of every block that is copied, of one group."""
    layout = geometry(block_size, [window], num_sink_tokens)
    ends = End(layout, [source]), End(layout, [destination])
    plan = transfer_plan(*ends, prompt_len, have=Have([cached]), tokens=tokens, num_reused=num_reused)
    assert all(copy.source_token == copy.token == copy.num_tokens % block_size == 0 for copy in plan)
    return [(c.source_slot + i, c.slot + i) for c in plan for i in range(c.num_tokens // block_size)]


def everything(prompt_len: int, block_size: int) -> Suffix:
    """A receiver that has room for every block: its slots are ordinals."""
    return Suffix(range(num_blocks(prompt_len, block_size)), prompt_len)


def table(*slots: int) -> Anchored:
    return Anchored([(0, slots)])


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
    ends = Anchored([(source_start // 64, source)]), Anchored([(destination_start // 64, destination)])
    assert pairs(*ends, source_start + 64 * len(source), 64) == expected


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
    end = End(geometry(8, windows, 0), [everything(prompt_len, 8)] * len(windows))
    plan = transfer_plan(end, end, prompt_len, have=Have([num_cached_tokens] * len(windows)))
    sums = [sum(copy.num_tokens // 8 for copy in plan if copy.group == group) for group in range(len(windows))]
    assert tuple(sums) == moved


def test_a_partly_cached_block_is_sent_again() -> None:
    assert [cached_blocks(tokens, 8) for tokens in (0, 7, 8, 15, 16)] == [0, 0, 1, 1, 2]


def kept_slots(
    slots: list[int], window: int | None, num_cached_tokens: int, *, prompt_len: int = 32, tpb: int = 8, spec: int = 0
) -> list[int]:
    """The slots of a receiver's list that something is copied to, when the sender still has every block."""
    destination = Suffix(slots, prompt_len + spec)
    found = pairs(everything(prompt_len, tpb), destination, prompt_len, tpb, window, cached=num_cached_tokens)
    assert [source for source, _ in found] == list(range(num_blocks(prompt_len, tpb)))[-len(found) :] or not found
    return [slot for _, slot in found]


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


def test_a_sender_trims_its_list_by_the_window_and_never_by_what_is_cached_elsewhere() -> None:
    """What is cached at the receiver is the receiver's to say: the sender's list is whole and pairs with all of it."""
    for slots in ([20, 21], [18, 19, 20, 21]):  # evicted, and not evicted yet
        assert pairs(Suffix(slots, 32), Suffix([70, 71], 32), 32, 8, 16) == [(20, 70), (21, 71)]
        assert pairs(Suffix(slots, 32), Suffix([70, 71], 32), 32, 8, 16, cached=24) == [(21, 71)]


@pytest.mark.parametrize("slots", [[100, 101, 102, 103, 104], [102, 103, 104]])
def test_a_speculative_tail_does_not_shift_the_blocks_before_it(slots: list[int]) -> None:
    assert kept_slots(slots, 16, 16, spec=8) == [102, 103]


@pytest.mark.parametrize(("prompt_len", "num_listed", "expected"), [(17, 4, 3), (17, 3, 3), (16, 3, 2)])
def test_extra_speculative_tokens_add_no_block(prompt_len: int, num_listed: int, expected: int) -> None:
    assert len(kept_slots(list(range(num_listed)), None, 0, prompt_len=prompt_len, spec=7)) == expected


@pytest.mark.parametrize("prompt_len", [1150, 1151])
def test_a_compacted_window_with_a_speculative_block_keeps_all_but_the_last(prompt_len: int) -> None:
    (entry,) = geometry(128, [133], 0).groups
    (group,) = needed_units([entry], prompt_len, 128)
    valid = sum(count for _, count in group.runs)
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
    assert pairs(Suffix([10, 11], 32), Suffix([20, 21, 22], 32), 32, 8, 24) == [(10, 21), (11, 22)]
    assert pairs(Suffix([10, 11], 32), Suffix([20, 21, 22, 23], 32), 32, 8) == [(10, 22), (11, 23)]
    assert pairs(Suffix([10, 11, 12, 13], 32), Suffix([20, 21], 32), 32, 8) == [(12, 20), (13, 21)]


def test_of_a_chunk_that_is_wholly_stale_nothing_is_sent() -> None:
    assert pairs(Suffix([], 16), Suffix([], 16), 32, 8, 16, tokens=range(16)) == []
    assert pairs(everything(32, 8), everything(32, 8), 32, 8, 16, tokens=range(16)) == []


def test_the_last_block_is_copied_whole_however_few_tokens_it_has() -> None:
    assert pairs(Suffix([4, 5, 6], 17), Suffix([7, 8, 9], 17), 17, 8) == [(4, 7), (5, 8), (6, 9)]
    assert pairs(Suffix([4, 5, 6], 17), Suffix([7, 8, 9], 17), 17, 8, cached=15) == [(5, 8), (6, 9)]


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
    ("slots", "tokens", "expected"),
    [
        ((104, 105, 106, 107), range(16), ()),
        ((104, 105, 106, 107), range(16, 32), (104, 105, 106, 107)),
        ((104, 105, 106, 107), range(20, 28), (105, 106)),
        ((104, 105, 106, 107), range(32, 32), ()),
    ],
)
def test_a_whole_prompt_list_is_projected_on_a_chunk(
    slots: tuple[int, ...], tokens: range, expected: tuple[int, ...]
) -> None:
    """8 blocks of 4 tokens, of which the sender still has the last four."""
    found = pairs(everything(32, 4), Suffix(slots, 32), 32, 4, tokens=tokens)
    assert tuple(slot for _, slot in found) == expected


def test_a_list_of_an_earlier_part_of_the_prompt_has_nothing_in_a_later_chunk() -> None:
    assert pairs(everything(32, 4), Anchored([(0, (1, 2, 3))]), 32, 4, tokens=range(16, 32)) == []


def test_a_chunk_may_be_empty_and_not_less() -> None:
    assert not final_span(12, 12, 32, 0, 4)
    with pytest.raises(ValueError, match=r"\[12, 11\) ends before it starts"):
        final_span(12, 11, 32, 0, 4)


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
    assert pairs(table(*source), table(*destination), 8 * len(source), 8) == expected


def test_a_sender_that_has_not_evicted_sends_only_the_logical_window() -> None:
    prompt_len = 128 * 1024
    assert len(pairs(everything(prompt_len, 64), everything(prompt_len, 64), prompt_len, 64, 4096)) in (64, 65)


def test_a_receivers_speculative_block_does_not_shift_a_windowed_list() -> None:
    """P 139, W 3, 8 tokens per block: by length alone source ordinal 17 went to destination ordinal 18."""
    assert pairs(Suffix([117], 139), Suffix([217, 218], 139 + 8), 139, 8, 3) == [(117, 217)]


def test_sinks_need_an_anchor_and_survive_with_one() -> None:
    """P 1024, W 128, S 32: five blocks are resident, which no length can tell from `the last four`."""
    with pytest.raises(ValueError, match="32 sink tokens needs an anchor"):
        table_of_suffix([1, 2, 3, 4, 5], prompt_len=1024, block_size=32, num_sink_tokens=32)
    with pytest.raises(ValueError, match="32 sink tokens needs an anchor"):
        pairs(Suffix([1, 2, 3, 4, 5], 1024), everything(1024, 32), 1024, 32, 128, num_sink_tokens=32)
    held = Anchored([(0, [50]), (28, [51, 52, 53, 54])])
    whole = table(*range(32))
    found = [(50, 0), (51, 28), (52, 29), (53, 30), (54, 31)]
    assert pairs(held, whole, 1024, 32, 128, num_sink_tokens=32) == found


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
