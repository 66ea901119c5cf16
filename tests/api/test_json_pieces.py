from __future__ import annotations

import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.api.http.json_pieces import BLOCK_NBYTES, CHARS, Encoded, blocks, encode_json, json_pieces

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(VALUES)
def test_pieces_are_the_json_of_the_value(value: object) -> None:
    assert b"".join(json_pieces(value)) == encode_json(value)


@pytest.mark.parametrize(
    "value",
    [
        list(range(100_000)),
        'é🦊\ud800\\"\n' * CHARS,
        {"a": ["text"] * 5000, "b": {"c": [1.5] * 3000, "d": [], "e": {}}},
        [{"x": list(range(3000))}, {}],
    ],
    ids=["numbers", "text", "both", "objects"],
)
def test_large_values_come_in_small_pieces_and_blocks(value: object) -> None:
    pieces = list(json_pieces(value))
    assert b"".join(pieces) == encode_json(value)
    assert max(map(len, pieces)) <= 8 * CHARS
    joined = list(blocks(pieces))
    assert b"".join(joined) == b"".join(pieces)
    assert all(BLOCK_NBYTES <= len(block) <= BLOCK_NBYTES + 8 * CHARS for block in joined[:-1])


def test_arrays_are_lists_and_encoded_items_are_taken_as_they_are() -> None:
    value = {"ids": array("i", range(5000)), "none": array("i"), "done": Encoded([b'{"a":1}', b"2"] * 100)}
    read = json.loads(b"".join(json_pieces(value)))
    assert read == {"ids": list(range(5000)), "none": [], "done": [{"a": 1}, 2] * 100}
