"""Every reader of a peer's bytes, as `make fuzz` drives it, on bytes that hypothesis draws; and what fuzzing found."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tools import load_tool

FUZZ = load_tool("fuzz_targets")
GOLDEN = [
    bytes.fromhex(line.split()[1]) for line in (Path(__file__).parent / "golden_messages.txt").read_text().splitlines()
]


@pytest.mark.parametrize("target", sorted(FUZZ.TARGETS))
def test_readers_take_what_the_fuzzer_starts_from(target: str) -> None:
    for seed in FUZZ.seeds(target, GOLDEN):
        FUZZ.TARGETS[target](seed)


@pytest.mark.parametrize("target", sorted(FUZZ.TARGETS))
@given(data=st.binary(max_size=400))
def test_readers_take_any_bytes(target: str, data: bytes) -> None:
    FUZZ.TARGETS[target](data)


@pytest.mark.parametrize(("target", "before"), [("hello", 3), ("welcome", 2)])
@given(drawn=st.lists(st.tuples(st.sampled_from(range(len(FUZZ.DRAWS))), st.integers(0, 255)), max_size=3))
def test_any_geometry_is_paired_or_refused(target: str, before: int, drawn: list[tuple[int, int]]) -> None:
    """As above, past the `before` bytes of other draws: which fields are changed, and to what."""
    fields = b"".join(bytes((name, value)) for name, value in drawn)
    for sizes in (b"\0", b"\1"):  # slots as drawn, and as the other fields make them
        FUZZ.TARGETS[target](bytes(before) + bytes([len(drawn)]) + fields + sizes)
