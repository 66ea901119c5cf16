"""What is particular to the Triton kernels: splits, tiles, bytes they must not load, eight-bit KV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.interpreter import missing_interpreter
from support.oracles.attention_world import CASES, MIXED, Case, World

from disagg.kernels import ops
from disagg.kernels.device_plan import DevicePlan
from disagg.kernels.dispatch import CALLS, forced
from disagg.kernels.scales import INT8_NAN, KVScales, largest, quantise
from disagg.kernels.triton.launch import SplitSpace, cut, num_splits
from disagg.kernels.workspace import Workspace

pytestmark = pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))

SINKS = Case(((60, 3), (61, 1), (2, 1), (0, 30), (90, 20)), window=9, num_sink_tokens=11)
LONG = Case(((700, 1), (3, 1), (1100, 1)), head_dim=8, num_kv_heads=1, num_layers=1, layer=0)


@pytest.fixture(autouse=True)
def triton_serves() -> Iterator[None]:
    CALLS.clear()
    with forced("triton"):
        yield
    assert not [name for name in CALLS if name.startswith("torch:")]


def assert_agrees(world: World, tolerance: float = 3e-6, **how: bool) -> None:
    np.testing.assert_allclose(world.actual(**how), world.expected(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("sink_logits", [False, True])
def test_splits_of_a_long_sequence_merge_to_the_whole(window: int | None, sink_logits: bool) -> None:
    assert_agrees(World(replace(LONG, window=window, sink_logits=sink_logits)))
    assert CALLS["kernel:decode_attention_split"] == CALLS["kernel:merge_splits"] == 1
    assert CALLS["kernel:decode_attention"] == CALLS["kernel:prefill_attention"] == 0


def test_a_short_window_is_not_split_however_long_the_sequence() -> None:
    assert_agrees(World(replace(LONG, window=50, num_sink_tokens=3)))
    assert CALLS["kernel:decode_attention"] == 1
    assert CALLS["kernel:decode_attention_split"] == 0


@pytest.mark.parametrize(
    ("num_programs", "num_keys", "expected"),
    [(1, 0, 1), (1, 64, 1), (1, 128, 1), (1, 256, 2), (1, 8192, 64), (64, 8192, 8), (512, 8192, 1), (0, 0, 1)],
)
def test_splits_fill_the_device_and_follow_the_keys(num_programs: int, num_keys: int, expected: int) -> None:
    splits = num_splits(num_programs=num_programs, num_keys=num_keys, chunk_keys=64, num_processors=128)
    assert splits == expected


@pytest.mark.parametrize(("num_parts", "head_dim"), [(1, 1), (7, 5), (6, 4), (64, 128)])
def test_the_space_for_splits_is_cut_into_all_that_was_counted(num_parts: int, head_dim: int) -> None:
    space = SplitSpace(num_parts, head_dim)
    outs, maxima, sums = space.cut(torch.empty(space.num_elements))
    assert (len(outs), len(maxima), len(sums)) == (num_parts * head_dim, num_parts, num_parts)
    assert [(part.data_ptr() - outs.data_ptr()) % 16 for part in (maxima, sums)] == [0, 0]


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256, 512])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_large_heads(head_dim: int, dtype: torch.dtype, tolerance: float) -> None:
    case = Case(((21, 1), (17, 3)), window=19, head_dim=head_dim, dtype=dtype, num_kv_heads=1, num_layers=2)
    assert_agrees(World(case), tolerance)


@pytest.mark.parametrize("case", [Case(MIXED), Case(MIXED, window=11), SINKS], ids=["full", "window", "sink tokens"])
def test_what_no_query_sees_may_be_nan(case: Case) -> None:
    assert_agrees(World(replace(case, unseen=float("nan"))))


@pytest.mark.parametrize("case", [Case(MIXED), SINKS, Case(MIXED, queries_per_head=7)], ids=["full", "sinks", "seven"])
def test_tiles_of_few_queries_do_not_change_the_result(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.kernels.triton.launch.TILE_ROWS", {4: 16})
    monkeypatch.setattr("disagg.kernels.triton.launch.CHUNK_KEYS", 16)
    assert_agrees(World(replace(case, unseen=float("nan"))))


def test_a_query_may_lie_heads_first() -> None:
    assert_agrees(World(Case(MIXED, window=11)), transposed=True)


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scaled", [False, True])
def test_eight_bit_kv(stored: torch.dtype, dtype: torch.dtype, tolerance: float, scaled: bool) -> None:
    assert_agrees(World(Case(MIXED, window=11, dtype=dtype, stored=stored, scaled=scaled)), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_int8_kv_with_scales(dtype: torch.dtype, tolerance: float) -> None:
    """Converted in the kernels themselves, unlike fp8 here."""
    assert_agrees(World(Case(MIXED, window=11, dtype=dtype, stored=torch.int8, scaled=True)), tolerance)


def test_scales_of_int8_ignored_are_noticed() -> None:
    world = World(Case(MIXED, window=11, stored=torch.int8, scaled=True))
    expected, world.scales = world.expected(), None
    assert np.abs(world.actual() - expected).max() > 1e-2


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.int8])
def test_numbers_beyond_eight_bits_are_counted(stored: torch.dtype) -> None:
    world = World(Case(((0, 3),), head_dim=5, num_kv_heads=2, stored=stored))
    plan = ops.plan(world.batch, world.pool, torch.float32, Workspace())
    counter = torch.zeros((), dtype=torch.int64)
    scales = KVScales(torch.tensor([1.0, 0.5]), torch.tensor([2.0, 0.25]), counter)
    key, value = torch.full((3, 2, 5), 0.1), torch.full((3, 2, 5), -0.1)
    ops.write_kv(world.pool, plan, key, value, scales=scales)
    assert int(counter) == 0
    most = largest(stored)
    key[0, 0, 0], key[1, 1, 4], key[2, 0, 1], value[2, 1, 3] = 1.1 * most, -0.51 * most, torch.inf, 0.3 * most
    key[2, 1, 2], value[0, 0, 0] = 0.49 * most, 1.9 * most
    ops.write_kv(world.pool, plan, key, value, scales=scales)
    assert int(counter) == 3


def test_int8_rounds_as_torch_and_keeps_one_code_for_what_is_not_finite() -> None:
    world = World(Case(((0, 6),), head_dim=1, num_kv_heads=1, stored=torch.int8))
    plan = ops.plan(world.batch, world.pool, torch.float32, Workspace())
    new = torch.tensor([1e6, -1e6, torch.nan, -torch.inf, 2.5, -3.5]).view(6, 1, 1)
    ops.write_kv(world.pool, plan, new, new)
    stored = world.pool[int(world.tables[0][0]), 0, 0, :6, 0]
    assert (
        stored.tolist() == [127, -127, INT8_NAN, INT8_NAN, 2, -4] == quantise(new.flatten(), torch.int8, None).tolist()
    )
    query = torch.ones(6, 2, 1)
    out = ops.paged_attention(query, world.pool, plan, scale=0.01)
    assert not out[2:].isfinite().any()


def test_a_bfloat16_pool_serves_float32_queries() -> None:
    assert_agrees(World(Case(MIXED, stored=torch.bfloat16)))


def test_eight_bit_writes_saturate_and_keep_nan() -> None:
    world = World(Case(((0, 3),), head_dim=1, num_kv_heads=1, stored=torch.float8_e4m3fn))
    plan = ops.plan(world.batch, world.pool, torch.float32, Workspace())
    new = torch.tensor([1e6, -1e6, float("nan")]).view(3, 1, 1)
    ops.write_kv(world.pool, plan, new, new)
    stored = world.pool[int(world.tables[0][0]), 0, 0, :3, 0].float()
    assert stored[:2].tolist() == [448, -448]
    assert stored[2].isnan()


def wrong(world: World, **changed: Any) -> float:
    """Largest error when the plan is changed behind attention's back."""
    plan = ops.plan(world.batch, world.pool, torch.float32, Workspace())
    assert isinstance(plan, DevicePlan)
    ops.write_kv(world.pool, plan, *world.new())
    query = torch.from_numpy(world.queries).float()
    out = ops.paged_attention(query, world.pool, replace(plan, **changed), scale=world.case.head_dim**-0.5)
    return float(np.abs(out.double().numpy() - world.expected()).max())


def test_sink_tokens_ignored_a_window_off_by_one_and_an_offset_ignored_are_noticed() -> None:
    case = Case(((60, 3), (90, 1)), window=9, num_sink_tokens=3)
    assert wrong(World(case)) < 3e-6
    assert wrong(World(case), num_sink_tokens=0) > 1e-2
    assert wrong(World(case), window=8) > 1e-2
    plan = ops.plan(World(case).batch, World(case).pool, torch.float32, Workspace())
    assert isinstance(plan, DevicePlan)
    runs = plan.runs.clone()
    assert (runs[:, 3] > 0).all()
    runs[:, 3] -= 8
    assert wrong(World(case), runs=runs) > 1e-2


def test_sink_logits_and_softcap_ignored_are_noticed() -> None:
    assert wrong(World(Case(MIXED, sink_logits=True))) > 1e-2
    assert wrong(World(Case(MIXED, softcap=1.5))) > 1e-2


def test_a_batch_of_nothing_launches_nothing() -> None:
    world = World(Case(((5, 0), (0, 0))))
    assert world.actual().shape == (0, 4, 7)
    assert not [name for name in CALLS if name.startswith("kernel:")]


@given(
    runs=st.lists(st.tuples(st.integers(0, 45), st.integers(0, 5)), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 3, 8, 16]),
    window=st.none() | st.integers(1, 30),
    num_sink_tokens=st.integers(0, 9),
    softcap=st.none() | st.just(2.0),
    sink_logits=st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_any_batch_agrees_with_the_torch_reference(
    runs: list[tuple[int, int]],
    block_size: int,
    window: int | None,
    num_sink_tokens: int,
    softcap: float | None,
    sink_logits: bool,
) -> None:
    case = Case(tuple(runs), block_size, window, num_sink_tokens, 1, 3, 5, softcap, sink_logits)
    actual = World(case).actual()
    with forced("torch"):
        expected = World(case).actual()
    for name in [name for name in CALLS if name.startswith("torch:")]:
        del CALLS[name]
    np.testing.assert_allclose(actual, expected, atol=3e-6, rtol=0)


def test_a_plan_serves_the_scratch_pages_of_another_layer() -> None:
    for name in ("window", "decode alone"):
        world = World(CASES[name])
        np.testing.assert_allclose(world.actual_of_moved(), world.expected(), atol=3e-6, rtol=0)


def test_wrong_shapes_and_dtypes_are_refused_before_a_launch() -> None:
    world = World(Case(((3, 1),)))
    plan = ops.plan(world.batch, world.pool, torch.float32, Workspace())
    good = torch.zeros(1, 4, 7)
    for bad, told in (
        (good[:, :3], "3 query heads over 2 kv heads"),
        (good.double(), "dtype"),
        (torch.zeros(2, 4, 7), "shape"),
        (torch.zeros(1, 4, 14)[..., ::2], "not contiguous"),
    ):
        with pytest.raises(AssertionError, match=told):
            ops.paged_attention(bad, world.pool, plan, scale=1.0)


@pytest.mark.parametrize(
    ("head_dim", "heads_per_kv", "itemsize"),
    [(1, 1, 4), (64, 8, 2), (80, 7, 2), (128, 71, 2), (256, 1, 4), (512, 8, 2)],
)
@pytest.mark.parametrize("decode", [True, False])
def test_a_cut_holds_whole_queries_and_operands_that_dot_takes(
    head_dim: int, heads_per_kv: int, itemsize: int, decode: bool
) -> None:
    how = cut(head_dim=head_dim, heads_per_kv=heads_per_kv, itemsize=itemsize, decode=decode)
    assert min(how.rows, how.keys, how.padded_dim) >= 16
    assert how.num_queries >= 1
    assert how.rows >= how.num_queries * heads_per_kv
    assert how.padded_dim >= head_dim
    assert not decode or how.num_queries == 1
