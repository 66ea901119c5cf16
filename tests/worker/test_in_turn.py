"""A long list is said in parts of a bounded length, and none of it is left out for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg.worker.in_turn import InTurn


@given(length=st.integers(0, 40), most=st.integers(1, 12))
def test_every_item_is_named_once_in_each_round_and_no_part_is_too_long(length: int, most: int) -> None:
    turn, items = InTurn(most), range(length)
    parts = [turn.some(items) for _ in range(length)]
    assert all(len(part) == min(length, most) for part in parts)
    said = [item for part in parts for item in part]
    assert (
        said == [number % length for number in range(len(said))] if length > most else parts == [tuple(items)] * length
    )


def test_a_list_that_shrinks_is_begun_anew_where_its_end_was_passed() -> None:
    turn = InTurn(3)
    assert turn.some(range(10)) == (0, 1, 2)
    assert turn.some(range(9)) == (3, 4, 5)
    assert turn.some(range(4)) == (2, 3, 0)
    assert turn.some(range(2)) == (0, 1)
