"""The compiled decode attention and write against the dense oracle and torch operations; and that nothing needs it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles.attention_world import CASES, MIXED, Case, World

from disagg.kernels import native, native_attention, native_matmul, native_prefill, ops, reference
from disagg.kernels.batch import PagedBatch
from disagg.kernels.dispatch import CALLS, forced
from disagg.kernels.native_attention import ATTENTION, WRITE
from disagg.kernels.workspace import Workspace

needs_helper = pytest.mark.skipif(
    not native_attention.is_loaded(),
    reason="the compiled helper is not loaded: no C compiler when the package was installed, or DISAGG_NATIVE=off",
)
FAR = ((300, 1), (17, 1), (255, 1), (256, 1), (0, 1), (777, 1))
"""Decode rows around and beyond the 256 keys that are taken at once."""

SHAPES = {
    "far": Case(FAR, head_dim=20),
    "far, window": Case(FAR, window=257, head_dim=20),
    "far, sink tokens": Case(FAR, window=60, num_sink_tokens=37, head_dim=20),
    "far, all sinks": Case(FAR, window=11, num_sink_tokens=290, sink_logits=True, block_size=16),
    "sinks end in the window's first block": Case(((20, 1), (21, 1), (22, 1)), window=9, num_sink_tokens=10),
    "far, softcap": Case(FAR, softcap=1.5, sink_logits=True),
    "blocks of one": Case(FAR, block_size=1, window=70),
    "heads of 64": Case(FAR, head_dim=64, block_size=16, queries_per_head=3),
    "heads of 80": Case(MIXED, head_dim=80, queries_per_head=4),
    "heads of 128": Case(MIXED, head_dim=128, queries_per_head=5, num_kv_heads=1),
    "heads of 512": Case(MIXED, head_dim=512, queries_per_head=1),
    "nine queries per head": Case(FAR, queries_per_head=9, num_kv_heads=1, head_dim=19),
    "live blocks with NaN that no query sees": Case(MIXED, window=11, unseen=float("nan")),
}


def decode_rows(case: Case) -> int:
    return sum(n == 1 for _, n in case.runs)


def error(world: World, *, transposed: bool = False) -> float:
    return float(np.abs(world.actual(transposed=transposed) - world.expected()).max())


@pytest.fixture(params=[0, 256, 512])
def width(request: pytest.FixtureRequest) -> Iterator[int]:
    """The widest vectors that the helper may use; a processor without them takes narrower ones."""
    library = native.library()
    assert library is not None
    widest = ctypes.c_int.in_dll(library, "disagg_widest_vectors")
    before, widest.value = widest.value, request.param
    yield request.param
    widest.value = before


@needs_helper
@pytest.mark.parametrize("name", [*CASES, *SHAPES])
def test_agrees_with_dense_attention(name: str, width: int) -> None:
    case = {**CASES, **SHAPES}[name]
    CALLS.clear()
    assert error(World(case)) < 3e-6
    assert CALLS[ATTENTION] == (decode_rows(case) > 0)
    assert CALLS[WRITE] == 1


@needs_helper
@given(
    runs=st.lists(st.tuples(st.integers(0, 70), st.sampled_from([0, 1, 1, 1, 4])), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 2, 5, 8]),
    window=st.none() | st.integers(1, 30),
    num_sink_tokens=st.integers(0, 19),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    head_dim=st.sampled_from([1, 4, 16, 17, 37]),
    sink_logits=st.booleans(),
    transposed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_batch_agrees_with_dense_attention(
    runs: list[tuple[int, int]],
    block_size: int,
    window: int | None,
    num_sink_tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    sink_logits: bool,
    transposed: bool,
) -> None:
    case = Case(tuple(runs), block_size, window, num_sink_tokens, *heads, head_dim, None, sink_logits)
    if sum(n for _, n in runs):
        assert error(World(case), transposed=transposed) < 3e-6


@needs_helper
@pytest.mark.parametrize("factor", [1e3, 1e38])
def test_scores_of_any_size_are_weighed_as_torch_weighs_them(factor: float) -> None:
    """One key takes all weight; at 1e38 scores overflow, which torch answers with NaN."""
    world = World(Case(FAR, head_dim=16))
    world.queries = np.minimum(world.queries * factor, 3e38)
    with native_attention.left_out():
        expected = world.actual()
    assert np.isnan(expected).any() == (factor == 1e38)
    np.testing.assert_allclose(world.actual(), expected, atol=3e-6, rtol=0)


@needs_helper
def test_a_window_off_by_one_is_noticed() -> None:
    world = World(Case(FAR, window=11))
    world.batch = PagedBatch(world.batch.runs, 8, 10, 0)
    assert error(world) > 1e-2


@needs_helper
def test_ignored_sink_tokens_are_noticed() -> None:
    world = World(Case(FAR, window=11, num_sink_tokens=5))
    world.batch = PagedBatch(world.batch.runs, 8, 11, 0)
    assert error(world) > 1e-2


@needs_helper
def test_ignored_sink_logits_are_noticed() -> None:
    world = World(Case(FAR, window=11, sink_logits=True))
    expected, world.sink_logits = world.expected(), None
    assert np.abs(world.actual() - expected).max() > 1e-2


@needs_helper
def test_an_ignored_front_offset_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose windows were counted from the sequence's beginning meet the blocks that were evicted there."""
    exact = native_attention.decode_rows

    def ignoring(*args: object) -> native_attention.DecodeRows:
        made = exact(*args)  # type: ignore[arg-type]
        made.rows[:, 3] -= made.rows[:, 2]
        made.rows[:, 2] = 0
        return made

    monkeypatch.setattr(native_attention, "decode_rows", ignoring)
    with pytest.raises(AssertionError, match="has no slot"):
        World(Case(((300, 1),), window=11)).actual()


@needs_helper
@pytest.mark.parametrize("slot", [-1, 0, 1000])
def test_a_block_without_a_slot_is_never_read(slot: int) -> None:
    world = World(Case(((20, 1),)))
    world.tables[0][1] = slot
    with pytest.raises(AssertionError, match="has no slot"):
        world.actual()


@needs_helper
@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("runs", [FAR, ((90, 1),), MIXED])
def test_threads_do_not_change_the_result(
    num_threads: int, runs: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(Case(runs, num_kv_heads=3))
    alone = world.actual()
    monkeypatch.setattr(native_attention, "MIN_NBYTES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    plan = ops.plan(world.batch, world.pool, torch.float32, Workspace())
    assert isinstance(plan, reference.Plan)
    assert plan.decodes is not None
    assert len(plan.decodes.cuts) == num_threads
    assert np.array_equal(world.actual(), alone)


def test_small_work_wakes_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    pool = torch.empty(1, 2, 2, 16, 64)  # 1 KiB for each key
    assert native_attention._cuts(np.array([8191]), pool) == ((0, 2),)
    assert native_attention._cuts(np.array([4096, 4096]), pool) == ((0, 2), (2, 4))


@needs_helper
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_written_is_what_torch_writes(dtype: torch.dtype, transposed: bool) -> None:
    worlds = [World(Case(MIXED, window=11, head_dim=8, dtype=dtype)) for _ in range(2)]
    CALLS.clear()
    for world, way in zip(worlds, (native_attention.left_out(), forced("torch")), strict=True):
        key, value = world.new()
        if transposed:
            key = key.transpose(0, 1).contiguous().transpose(0, 1)
        with way:
            plan = ops.plan(world.batch, world.pool, dtype, Workspace())
            ops.write_kv(world.pool, plan, key, value)
    assert CALLS[WRITE] == 1
    assert torch.equal(worlds[0].pool.nan_to_num(3), worlds[1].pool.nan_to_num(3))


@needs_helper
def test_types_that_would_be_converted_stay_with_torch() -> None:
    for case in (
        Case(MIXED, dtype=torch.float16),
        Case(MIXED, dtype=torch.bfloat16, stored=torch.float32),
        Case(MIXED, stored=torch.float8_e4m3fn, scaled=True),
    ):
        CALLS.clear()
        assert error(World(case)) < 3e-2
        assert CALLS[ATTENTION] == 0


@needs_helper
@pytest.mark.parametrize("name", [*CASES, *SHAPES])
def test_bfloat16_kv_is_read_as_float32_to_the_last_bit(name: str, width: int) -> None:
    case = {**CASES, **SHAPES}[name]
    CALLS.clear()
    assert error(World(replace(case, stored=torch.bfloat16))) < 3e-6
    assert CALLS[ATTENTION] == (decode_rows(case) > 0)


@needs_helper
@pytest.mark.parametrize("sink_logits", [False, True])
def test_agrees_in_bfloat16(sink_logits: bool) -> None:
    CALLS.clear()
    assert error(World(Case(MIXED, window=11, sink_logits=sink_logits, dtype=torch.bfloat16))) < 2e-2
    assert CALLS[ATTENTION] == 1


@needs_helper
def test_scales_over_float32_are_honoured() -> None:
    CALLS.clear()
    assert error(World(Case(MIXED, stored=torch.float32, scaled=True))) < 3e-6
    assert (CALLS[ATTENTION], CALLS[WRITE]) == (1, 0)


def test_without_the_library_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_attention, "_library", None)
    CALLS.clear()
    assert error(World(Case(MIXED, window=11))) < 3e-6
    assert not [name for name in CALLS if name.startswith("native:")]


def test_the_helper_is_left_out_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "off")
    assert native._find() is None
    monkeypatch.setenv(native.VARIABLE, "of")
    with pytest.raises(ValueError, match="expected on or off"):
        native._find()


@needs_helper
def test_the_layout_is_of_the_size_it_has_in_c() -> None:
    library = native.library()
    assert library is not None
    assert (
        ctypes.sizeof(native_attention.AttentionLayout) == ctypes.c_int64.in_dll(library, "disagg_layout_nbytes").value
    )


def test_the_layouts_fields_are_those_of_c() -> None:
    source = Path(native_attention.__file__).with_name("native_parts.h").read_text()
    body = source[source.index("typedef struct {\n    int64_t num_kv_heads") : source.index("} Layout;")]
    at = [body.index(name) for name, _ in native_attention.AttentionLayout._fields_]
    assert at == sorted(at)


@needs_helper
def test_retargeted_rows_read_other_blocks() -> None:
    world = World(Case(((40, 1), (9, 1)), window=11))
    CALLS.clear()
    np.testing.assert_allclose(world.actual_of_moved(), world.expected(), atol=3e-6, rtol=0)
    assert CALLS[ATTENTION] == CALLS[WRITE] == 1


@needs_helper
@pytest.mark.parametrize("slot", [-1, 12])
def test_nothing_is_written_outside_the_pool(slot: int) -> None:
    memory = torch.zeros(14, 3, 2, 2, 8, 4)
    pool, new = memory[1:13, 1], torch.ones(2, 2, 4)  # twelve slots, with others' memory before and behind them
    at = np.array([3, slot], np.int64) * pool.stride(0) + 4
    with pytest.raises(IndexError, match="of a pool of 12"):
        native_attention.write(pool, at, new, new)
    assert memory.count_nonzero() == 0
    native_attention.write(pool, np.array([3, 11]) * pool.stride(0) + 4, new, new)
    assert memory.count_nonzero() == pool.count_nonzero() == 2 * new.numel()  # K and V


RUNS = {
    "prompts": Case(((0, 300), (0, 1), (17, 40), (256, 13), (0, 12)), head_dim=64, block_size=16),
    "chunks of a prompt, window": Case(((500, 150), (40, 30), (0, 64)), window=50, head_dim=32, block_size=16),
    "a window over chunks of keys": Case(((700, 60),), window=300, head_dim=32),
    "a window of one": Case(((3, 20), (0, 5)), window=1, head_dim=32),
    "sink logits and softcap": Case(((9, 33), (300, 5)), head_dim=96, sink_logits=True, softcap=1.5),
    "one head each": Case(((70, 25),), head_dim=128, queries_per_head=1, num_kv_heads=3, block_size=5),
    "NaN that no query sees": Case(((60, 40), (90, 1)), window=11, head_dim=32, unseen=float("nan")),
}


@needs_helper
@pytest.mark.parametrize("name", RUNS)
def test_runs_agree_with_dense_attention(name: str, width: int) -> None:
    CALLS.clear()
    assert error(World(RUNS[name])) < 3e-6
    assert CALLS[native_prefill.RUN] == sum(n > 1 for _, n in RUNS[name].runs) * native_matmul.is_fast()


@needs_helper
@given(
    runs=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 60)), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 5, 16]),
    window=st.none() | st.integers(1, 400),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    transposed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_runs_agree_with_dense_attention(
    runs: list[tuple[int, int]], block_size: int, window: int | None, heads: tuple[int, int], transposed: bool
) -> None:
    case = Case(tuple(runs), block_size, window, 0, *heads, 32)
    assert error(World(case), transposed=transposed) < 3e-6


@needs_helper
def test_heads_of_a_run_may_be_dealt_to_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_prefill, "MIN_PRODUCTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert error(World(RUNS["prompts"])) < 3e-6
    finally:
        torch.set_num_threads(before)


@needs_helper
def test_a_runs_window_off_by_one_is_noticed() -> None:
    world = World(RUNS["chunks of a prompt, window"])
    world.batch = replace(world.batch, window=49)
    assert error(world) > 1e-3


@needs_helper
def test_a_run_that_needs_a_block_without_a_slot_is_an_error() -> None:
    world = World(RUNS["prompts"])
    world.batch.runs[0].table[1] = 0
    with pytest.raises(AssertionError, match="has no slot"):
        world.actual()
