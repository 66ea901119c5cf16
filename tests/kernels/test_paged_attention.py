"""Paged attention, in torch operations and in Triton's interpreter, against a dense oracle.

The compiled helper has tests of its own (test_native_attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.model.interpreter import missing_interpreter
from support.oracles.attention_world import CASES, MIXED, Case, World

from disagg.cache.pool import NULL_SLOT as CACHE_NULL_SLOT
from disagg.cache.pool import TRASH_SLOT as CACHE_TRASH_SLOT
from disagg.kernels import native_attention, ops, reference
from disagg.kernels.batch import NULL_SLOT, TRASH_SLOT, PagedBatch
from disagg.kernels.dispatch import CALLS, forced
from disagg.kernels.workspace import Workspace


@pytest.fixture(autouse=True)
def torch_operations() -> Iterator[None]:
    with native_attention.left_out():
        yield


@pytest.fixture(params=["torch", "triton"])
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which implementation answers; afterwards, that it did."""
    if request.param == "triton" and (missing := missing_interpreter()):
        pytest.skip(missing)
    CALLS.clear()
    with forced(request.param):
        yield request.param
    other = {"torch": "triton", "triton": "torch"}[request.param]
    assert not [name for name in CALLS if name.startswith((f"{other}:", "native:"))]
    assert bool([name for name in CALLS if name.startswith("kernel:")]) == (request.param == "triton")


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_dense_attention(name: str, served: str) -> None:
    world = World(CASES[name])
    np.testing.assert_allclose(world.actual(), world.expected(), atol=3e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("sink_logits", [False, True])
def test_agrees_in_half_precision(dtype: torch.dtype, tolerance: float, sink_logits: bool, served: str) -> None:
    world = World(Case(MIXED, window=11, sink_logits=sink_logits, dtype=dtype))
    np.testing.assert_allclose(world.actual(), world.expected(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("window", [None, 6])
def test_tiles_of_queries_do_not_change_the_result(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_QUERIES", 4)
    world = World(Case(((0, 13), (9, 7), (30, 4), (11, 1)), window=window))
    np.testing.assert_allclose(world.actual(), world.expected(), atol=3e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 30])
def test_buckets_cut_by_size_do_not_change_the_result(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(Case(((100, 1), (7, 1), (98, 1), (0, 5), (99, 1), (101, 1)), window=window))
    case = world.case
    row_nbytes = 2 * case.num_kv_heads * case.head_dim * 4 * (112 if window is None else 40)
    monkeypatch.setattr(reference, "MAX_BUCKET_NBYTES", 2 * row_nbytes)
    plan = reference.plan(world.batch, world.pool, torch.float32, Workspace())
    assert [bucket.num_queries for bucket in plan.buckets] == [2, 2, 1]
    np.testing.assert_allclose(world.actual(), world.expected(), atol=3e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float16, 2e-3)])
def test_a_retargeted_plan_reads_other_blocks(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several buckets, whose cut by size must be the one that the plan was made with."""
    world = World(Case(((100, 1), (7, 1), (98, 1), (0, 5), (99, 1), (101, 1)), window=30, dtype=dtype))
    row_nbytes = 2 * world.case.num_kv_heads * world.case.head_dim * dtype.itemsize * 40
    monkeypatch.setattr(reference, "MAX_BUCKET_NBYTES", 3 * row_nbytes)
    plan = reference.plan(world.batch, world.pool, dtype, Workspace())
    assert [bucket.num_queries for bucket in plan.buckets] == [3, 2]
    np.testing.assert_allclose(world.actual_of_moved(), world.expected(), atol=tolerance, rtol=0)


def test_a_plan_that_was_not_retargeted_is_noticed(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "retarget", lambda plan, *_: plan)
    world = World(CASES["window"])
    assert not np.abs(world.actual_of_moved() - world.expected()).max() < 1e-2  # or NaN, of a dead slot


def test_a_bucket_over_the_wrong_queries_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(Case(((100, 1), (7, 1), (98, 1), (99, 1)), window=30))
    exact = reference._Planner._bucket
    monkeypatch.setattr(reference, "MAX_BUCKET_NBYTES", 1)

    def shifted(planner: reference._Planner, members: np.ndarray) -> reference.Bucket:
        return replace(exact(planner, members), queries=torch.from_numpy((members + 1) % 4))

    monkeypatch.setattr(reference._Planner, "_bucket", shifted)
    assert np.abs(world.actual() - world.expected()).max() > 1e-2


@given(
    runs=st.lists(st.tuples(st.integers(0, 45), st.integers(0, 9)), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 2, 5, 8]),
    window=st.none() | st.integers(1, 30),
    num_sink_tokens=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_batch_agrees_with_dense_attention(
    runs: list[tuple[int, int]], block_size: int, window: int | None, num_sink_tokens: int
) -> None:
    world = World(Case(tuple(runs), block_size, window, num_sink_tokens, head_dim=3, num_kv_heads=1))
    np.testing.assert_allclose(world.actual(), world.expected(), atol=3e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_int8_kv_agrees_with_dense_attention(dtype: torch.dtype, tolerance: float, served: str) -> None:
    world = World(Case(MIXED, window=11, dtype=dtype, stored=torch.int8, scaled=True))
    np.testing.assert_allclose(world.actual(), world.expected(), atol=tolerance, rtol=0)


def test_a_window_off_by_one_is_noticed(served: str) -> None:
    world = World(Case(MIXED, window=11))
    world.batch = PagedBatch(world.batch.runs, 8, 10, 0)
    assert np.abs(world.actual() - world.expected()).max() > 1e-2


def test_ignored_sink_tokens_are_noticed(served: str) -> None:
    world = World(CASES["window and sink tokens"])
    world.batch = replace(world.batch, num_sink_tokens=0)
    assert np.abs(world.actual() - world.expected()).max() > 1e-2


def test_an_ignored_front_offset_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys counted from the first block that is listed, as if none before it had been evicted."""
    exact = reference._padded

    def ignoring(*args: object) -> reference._Padded:
        made = exact(*args)  # type: ignore[arg-type]
        return replace(made, ordinals=np.broadcast_to(np.arange(made.ordinals.shape[1]), made.ordinals.shape))

    world = World(Case(((60, 1), (61, 1)), window=9, num_sink_tokens=11))
    np.testing.assert_allclose(world.actual(), world.expected(), atol=3e-6, rtol=0)
    monkeypatch.setattr(reference, "_padded", ignoring)
    assert not np.abs(World(world.case).actual() - world.expected()).max() < 1e-2


def test_a_workspace_may_serve_plan_after_plan(served: str) -> None:
    workspace = Workspace()
    for name in ("full attention", "one element", "decode in several buckets", "window"):
        world = World(CASES[name])
        np.testing.assert_allclose(world.actual(workspace), world.expected(), atol=3e-6, rtol=0)


def test_writes_touch_nothing_but_the_new_tokens(served: str) -> None:
    world = World(Case(((5, 3), (8, 1))))
    before = world.pool.clone()
    plan = ops.plan(world.batch, world.pool, torch.float32, Workspace())
    new = torch.ones(4, 2, 7)
    ops.write_kv(world.pool, plan, new, 2 * new)
    tables = world.tables
    for table, position in ((tables[0], 5), (tables[0], 6), (tables[0], 7), (tables[1], 8)):
        slot, offset = int(table[position // 8]), position % 8
        assert (world.pool[slot, 0, :, offset] == 1).all()
        assert (world.pool[slot, 1, :, offset] == 2).all()
        before[slot, :, :, offset] = world.pool[slot, :, :, offset]
    assert torch.equal(before.nan_to_num(3), world.pool.nan_to_num(3))


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_block_without_a_slot_is_never_read(name: str) -> None:
    if name == "triton" and (missing := missing_interpreter()):
        pytest.skip(missing)
    world = World(Case(((20, 1),)))
    world.tables[0][1] = -1
    with forced(name), pytest.raises(AssertionError, match="has no slot"):
        world.actual()


def test_the_reserved_slots_are_the_caches() -> None:
    assert (NULL_SLOT, TRASH_SLOT) == (CACHE_NULL_SLOT, CACHE_TRASH_SLOT)
