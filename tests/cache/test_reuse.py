from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles.cache_oracle import needed_blocks, readable_later, tiny_layout

from disagg.cache.identity import IDENTITY_NBYTES, BlockHasher, token_bytes
from disagg.cache.reuse import held_ordinals, longest_common

WINDOWS = st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=3, unique=True)


def goes_on(known, group, size, length):
    """Whether every stored token that a later query reads lies in a known block."""
    return all(
        known[t // size] for t in range(length) if readable_later(t, length, group.window, group.num_sink_tokens)
    )


@settings(deadline=None, max_examples=300)
@given(WINDOWS, st.integers(1, 5), st.integers(0, 6), st.integers(1, 60), st.data())
def test_the_longest_common_prefix_is_what_a_token_walk_finds(windows, size, sinks, prompt_len, data):
    layout = tiny_layout(*windows, block_size=size, num_sink_tokens=sinks)
    num_known = data.draw(st.integers(0, prompt_len // size))
    mostly = st.lists(st.sampled_from([True, True, True, False]), min_size=num_known, max_size=num_known)
    resident = [np.array(data.draw(mostly), dtype=np.bool_) for _ in layout.groups]
    lengths = range(0, min(num_known * size, prompt_len - 1) + 1, size)
    expected = max(
        length
        for length in lengths
        if all(goes_on(known, g, size, length) for known, g in zip(resident, layout.groups, strict=True))
    )
    assert longest_common(resident, layout, prompt_len) * size == expected


@settings(deadline=None, max_examples=200)
@given(st.none() | st.integers(1, 20), st.integers(1, 5), st.integers(0, 6), st.integers(1, 60), st.data())
def test_a_receiver_holds_any_subset_of_what_is_needed(window, size, sinks, prompt_len, data):
    (group,) = tiny_layout(window, block_size=size, num_sink_tokens=sinks).groups
    num_known = data.draw(st.integers(0, prompt_len // size))
    known = np.array(data.draw(st.lists(st.booleans(), min_size=num_known, max_size=num_known)), dtype=np.bool_)
    need = needed_blocks(prompt_len, group.window, group.num_sink_tokens, size)
    expected = [ordinal for ordinal in need if ordinal < num_known and known[ordinal]]
    assert held_ordinals(known, group, size, prompt_len).tolist() == expected


def test_the_last_token_of_a_prompt_is_always_computed():
    layout = tiny_layout(None, block_size=4)
    known = [np.ones(2, dtype=np.bool_)]
    assert [longest_common(known, layout, prompt_len) for prompt_len in (8, 9)] == [1, 2]


def test_without_kv_nothing_is_reused():
    assert longest_common([], tiny_layout(), 100) == 0


# --- names ----------------------------------------------------------------------------------------------------


def name(*, key=b"key", model="model", salt="", parents=(), tokens=(1, 2, 3, 4)):
    hasher = BlockHasher(key, model)
    parent = hasher.root(salt)
    for block in parents:
        parent = hasher.child(parent, token_bytes(block))
    return hasher.child(parent, token_bytes(tokens))


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"other"},
        {"model": "other"},
        {"salt": "other"},
        {"parents": [(1, 2, 3, 4)]},
        {"tokens": (1, 2, 4, 3)},
        {"tokens": (1, 2, 3)},
    ],
)
def test_a_name_depends_on_everything_that_the_kv_depends_on(change):
    assert name() == name()
    assert len(name()) == IDENTITY_NBYTES
    assert name(**change) != name()


def test_model_and_salt_cannot_pose_as_one_another():
    assert name(model="ab", salt="c") != name(model="a", salt="bc")
