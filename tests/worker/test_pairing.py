"""What a decode worker asks for when the prefill worker's blocks are finer or coarser, against a walk over tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracles.token_walk import attends

from disagg.cache.layout import LayerSpec, derive_layout
from disagg.cache.window import needed_ordinals
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.router import Dispatch, PeerTarget
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity, Sampling
from disagg.transceiver.wire.node import Node
from disagg.worker.pairing import Pairing

WINDOWS = (None, 5, 11)


def make(block_size: int, num_sink_tokens: int, dispatch: Dispatch) -> Pairing:
    layers = [LayerSpec(i, w, num_sink_tokens if w else 0, 2, 4, "float32", i) for i, w in enumerate(WINDOWS)]
    layout = derive_layout(layers, block_size=block_size, max_model_len=256)
    groups = tuple(GroupSemantics(g.window, g.num_sink_tokens, 2, 4, g.layers) for g in layout.groups)
    geometry = Geometry(block_size, "float32", groups, layout.slot_nbytes)
    identity = Identity(1, "f", "a", "float32", 256, "h")
    node = Node("me", "d", identity, geometry, ClusterKeys.published())
    return Pairing(node, layout, {"shm": False}, dispatch)


ALONE = Dispatch("t", 1, "r", "serve", (1,), Sampling(max_tokens=2), 60.0)


def dispatch(prompt_len: int, peer_block_size: int) -> Dispatch:
    geometry = make(peer_block_size, 0, ALONE).peer_geometry if peer_block_size else None
    peer = PeerTarget("peer", "p", "tcp://127.0.0.1:1", geometry)
    return Dispatch("t", 1, "r", "decode", tuple(range(prompt_len)), Sampling(max_tokens=2), 60.0, peer)


def needed_tokens(prompt_len: int, window: int | None, sinks: int) -> set[int]:
    queries = range(prompt_len, prompt_len + (window or 0) + 1)
    return {key for key in range(prompt_len) if any(attends(query, key, window, sinks) for query in queries)}


@given(
    prompt_len=st.integers(1, 70),
    sizes=st.sampled_from([(16, 8), (8, 16), (16, 2), (4, 16), (8, 8)]),
    sinks=st.sampled_from([0, 3]),
    data=st.data(),
)
def test_units_asked_for_are_those_that_hold_a_needed_token_in_a_reserved_block(
    prompt_len: int, sizes: tuple[int, int], sinks: int, data: Any
) -> None:
    block_size, peer_block_size = sizes
    pairing, unit = make(block_size, sinks, dispatch(prompt_len, peer_block_size)), min(sizes)
    needed = [needed_tokens(prompt_len, window, sinks if window else 0) for window in WINDOWS]
    blocks = [sorted({token // block_size for token in tokens}) for tokens in needed]
    held = [data.draw(st.sets(st.sampled_from(some))) if some else set() for some in blocks]
    reserved = [
        [(block, 10 + block) for block in some if block not in has] for some, has in zip(blocks, held, strict=True)
    ]
    destinations = pairing.destinations(reserved)
    partial = {(name.group, name.ordinal) for name in pairing.partial_blocks(destinations)}
    for group, tokens in enumerate(needed):
        units = {token // unit for token in tokens if token // block_size not in held[group]}
        assert destinations[group] == [(n, 10 + n * unit // block_size) for n in sorted(units)]
        for block, _ in reserved[group]:
            stored = range(block * block_size, min((block + 1) * block_size, prompt_len))
            parts = {token // unit for token in stored}
            assert ((group, block) in partial) == (not units.issuperset(parts))
    asked = pairing.reserved(destinations)
    assert [list(entry.ordinals) for entry in asked.required] == [[n for n, _ in pairs] for pairs in destinations]


def test_block_sizes_that_do_not_divide_never_start_a_transfer() -> None:
    assert not make(16, 0, dispatch(9, 24)).fits
    assert make(16, 0, dispatch(9, 8)).fits
    assert make(16, 0, dispatch(9, 0)).unit == 16
    assert not make(16, 0, ALONE).fits


@pytest.mark.parametrize(("block_size", "peer"), [(16, 8), (8, 16), (8, 8)])
def test_both_ends_plan_in_the_same_units(block_size: int, peer: int) -> None:
    assert make(block_size, 0, dispatch(9, peer)).unit == make(peer, 0, dispatch(9, block_size)).unit == 8


def test_what_a_prompt_needs_is_computed_once_per_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    pairing, calls = make(16, 0, dispatch(70, 8)), []
    counted = lambda *args: calls.append(args) or needed_ordinals(*args)  # noqa: E731
    monkeypatch.setattr("disagg.worker.pairing.needed_ordinals", counted)
    first = pairing.destinations([[(0, 5)], [], []])
    assert pairing.destinations([[(0, 5)], [], []]) == first
    assert len(calls) == len(WINDOWS)
