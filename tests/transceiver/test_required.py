from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.links.unchecked import raw
from support.oracles.token_walk import needed_blocks

from disagg.transceiver.layout.required import (
    check_required,
    full_copy_blocks,
    full_copy_nbytes,
    moved_nbytes,
    needed_units,
    required_units,
    runs_of,
)
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.values import GroupRuns


@dataclass(frozen=True)
class Group:
    window: int | None
    num_sink_tokens: int = 0


groups_strategy = st.lists(st.builds(Group, st.none() | st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=3)


@given(groups_strategy, st.integers(1, 70), st.integers(1, 9), st.data())
def test_required_units_are_what_token_walking_finds_less_what_is_held(
    groups: list[Group], prompt_len: int, block_size: int, data: st.DataObject
) -> None:
    held = [data.draw(st.sets(st.integers(0, 80))) for _ in groups]
    required = required_units(groups, prompt_len, block_size, held)
    for number, (group, entry) in enumerate(zip(groups, required, strict=True)):
        need = needed_blocks(prompt_len, group.window, block_size, group.num_sink_tokens)
        assert entry.group == number
        assert entry.ordinals == tuple(sorted(need - held[number]))
        assert all(a + b < c for (a, b), (c, _) in zip(entry.runs, entry.runs[1:], strict=False))
    check_required(required, needed_units(groups, prompt_len, block_size))


def test_a_sink_group_has_a_hole_between_sinks_and_window() -> None:
    assert needed_units([Group(128, 32)], 1024, 32) == (GroupRuns(0, ((0, 1), (28, 4))),)


def test_only_the_end_of_the_window_moves_of_a_long_prompt() -> None:
    assert moved_nbytes(needed_units([Group(4096)], 128 * 1024, 64), (1,)) in (64, 65)


def test_bytes_are_whole_blocks_times_their_groups_slot() -> None:
    required = needed_units([Group(None), Group(8)], 17, 8)
    assert moved_nbytes(required, (100, 10)) == 3 * 100 + 2 * 10
    assert full_copy_blocks(17, 8) == 3
    assert full_copy_nbytes(17, 8, (100, 10)) == 330


def test_nothing_is_required_of_a_receiver_that_holds_everything() -> None:
    required = required_units([Group(None)], 10, 4, [{0, 1, 2}])
    assert required == (GroupRuns(0, ()),)
    assert moved_nbytes(required, (8,)) == 0


@given(st.sets(st.integers(0, 50)))
def test_runs_enumerate_the_set_they_were_made_of(ordinals: set[int]) -> None:
    runs = runs_of(np.array(sorted(ordinals), dtype=np.int64))
    assert GroupRuns(0, runs).ordinals == tuple(sorted(ordinals))


NEED = (GroupRuns(0, ((0, 8),)), GroupRuns(1, ((0, 1), (5, 3))))


@pytest.mark.parametrize(
    "required",
    [
        (raw(GroupRuns, 2, ()),),
        (raw(GroupRuns, -1, ()),),
        (raw(GroupRuns, 1, ()), raw(GroupRuns, 0, ())),
        (raw(GroupRuns, 0, ()), raw(GroupRuns, 0, ())),
        (raw(GroupRuns, 0, ((0, 9),)),),
        (raw(GroupRuns, 0, ((-1, 2),)),),
        (raw(GroupRuns, 0, ((0, 0),)),),
        (raw(GroupRuns, 0, ((3, -1),)),),
        (raw(GroupRuns, 0, ((0, 2**60),)),),
        (raw(GroupRuns, 0, ((2, 2), (0, 1))),),
        (raw(GroupRuns, 0, ((0, 2), (1, 2))),),
        (raw(GroupRuns, 0, ((0, 2), (2, 2))),),
        (raw(GroupRuns, 1, ((0, 6),)),),
        (raw(GroupRuns, 1, ((4, 2),)),),
    ],
)
def test_runs_outside_the_need_or_out_of_form_are_the_peers_fault(required: tuple[GroupRuns, ...]) -> None:
    with pytest.raises(RemoteProtocolError):
        check_required(required, NEED)


@pytest.mark.parametrize(
    "required",
    [
        (),
        NEED,
        (GroupRuns(1, ((0, 1), (6, 1))),),
        (GroupRuns(0, ()), GroupRuns(1, ())),
        (GroupRuns(0, ((0, 2), (3, 5))),),
    ],
)
def test_any_subset_of_the_need_is_legal(required: tuple[GroupRuns, ...]) -> None:
    check_required(required, NEED)
