"""Paged attention against a token-walking dense oracle in float64 that knows nothing of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.cache.pool import NULL_SLOT as CACHE_NULL_SLOT
from disagg.kernels import ops, reference
from disagg.kernels.batch import NULL_SLOT, PagedBatch, QueryRun
from disagg.kernels.workspace import Workspace


@dataclass(frozen=True)
class Case:
    """`runs` = (start, num_queries) per sequence; `layer` of `num_layers` in a coalesced slot."""

    runs: tuple[tuple[int, int], ...]
    block_size: int = 8
    window: int | None = None
    num_sink_tokens: int = 0
    num_kv_heads: int = 2
    queries_per_head: int = 2
    head_dim: int = 7
    softcap: float | None = None
    sink_logits: bool = False
    num_layers: int = 3
    layer: int = 1
    dtype: torch.dtype = torch.float32

    def sees(self, query: int, key: int) -> bool:
        in_window = self.window is None or key > query - self.window
        return key <= query and (in_window or key < self.num_sink_tokens)


class World:
    """Random keys and values of every sequence, those before `start` laid out in shuffled slots, all else NaN."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(7)
        self.rng = rng
        shape = (case.num_kv_heads, case.head_dim)
        self.keys = [rng.standard_normal((start + n, *shape)) for start, n in case.runs]
        self.values = [rng.standard_normal((start + n, *shape)) for start, n in case.runs]
        num_queries = sum(n for _, n in case.runs)
        self.num_heads = case.num_kv_heads * case.queries_per_head
        self.queries = rng.standard_normal((num_queries, self.num_heads, case.head_dim))
        self.sink_logits = rng.standard_normal(self.num_heads) * 2 if case.sink_logits else None
        self.pool, self.tables = self._lay_out()
        runs = zip(case.runs, self.tables, strict=True)
        self.batch = PagedBatch(
            tuple(QueryRun(table, start, n) for (start, n), table in runs),
            case.block_size,
            case.window,
            case.num_sink_tokens,
        )

    def _lay_out(self) -> tuple[torch.Tensor, list[np.ndarray]]:
        case, size = self.case, self.case.block_size
        needed = [self._needed(start, n) for start, n in case.runs]
        num_slots = 2 + sum(len(ordinals) for ordinals in needed) + 3
        slots = iter(self.rng.permutation(np.arange(2, num_slots)))
        shape = (num_slots, case.num_layers, 2, case.num_kv_heads, size, case.head_dim)
        memory = torch.full(shape, float("nan"), dtype=case.dtype)
        memory[NULL_SLOT] = 0
        tables = []
        for ordinals, (start, n), keys, values in zip(needed, case.runs, self.keys, self.values, strict=True):
            table = np.full(-(-(start + n) // size), -1, np.int32)
            for ordinal in ordinals:
                table[ordinal] = next(slots)
                memory[table[ordinal]] = 0
                for position in range(ordinal * size, min((ordinal + 1) * size, start)):
                    both = torch.from_numpy(np.stack([keys[position], values[position]]))
                    memory[table[ordinal], case.layer, :, :, position % size] = both.to(case.dtype)
            tables.append(table)
        return memory[:, case.layer], tables

    def _needed(self, start: int, n: int) -> list[int]:
        queries = range(start, start + n)
        seen = {key for query in queries for key in range(start + n) if self.case.sees(query, key)}
        return sorted({key // self.case.block_size for key in seen})

    def expected(self) -> np.ndarray:
        case, out, flat = self.case, np.zeros_like(self.queries), 0
        for (start, n), keys, values in zip(case.runs, self.keys, self.values, strict=True):
            for position in range(start, start + n):
                seen = [key for key in range(position + 1) if case.sees(position, key)]
                for head in range(self.num_heads):
                    kv_head = head // case.queries_per_head
                    out[flat, head] = self._dense(
                        self.queries[flat, head], keys[seen, kv_head], values[seen, kv_head], head
                    )
                flat += 1
        return out

    def _dense(self, query: np.ndarray, keys: np.ndarray, values: np.ndarray, head: int) -> np.ndarray:
        scores = keys @ query * self.case.head_dim**-0.5
        if self.case.softcap is not None:
            scores = self.case.softcap * np.tanh(scores / self.case.softcap)
        sink = 0.0 if self.sink_logits is None else math.exp(self.sink_logits[head])
        weights = np.exp(scores)
        return weights @ values / (weights.sum() + sink)

    def actual(self, workspace: Workspace | None = None) -> np.ndarray:
        case = self.case
        plan = ops.plan(self.batch, self.pool, case.dtype, workspace or Workspace())
        new = [slice(start, start + n) for start, n in case.runs]
        shape = (-1, case.num_kv_heads, case.head_dim)
        key, value = (
            torch.from_numpy(np.concatenate([x[part] for x, part in zip(xs, new, strict=True)])).view(shape)
            for xs in (self.keys, self.values)
        )
        ops.write_kv(self.pool, plan, key.to(case.dtype), value.to(case.dtype))
        out = ops.paged_attention(
            torch.from_numpy(self.queries).to(case.dtype),
            self.pool,
            plan,
            scale=case.head_dim**-0.5,
            softcap=case.softcap,
            sink_logits=None if self.sink_logits is None else torch.from_numpy(self.sink_logits).float(),
        )
        assert out.shape == self.queries.shape
        return out.double().numpy()


MIXED = ((0, 13), (40, 1), (17, 5), (3, 1), (0, 1))

CASES = {
    "full attention": Case(MIXED),
    "window": Case(MIXED, window=11),
    "window of one": Case(MIXED, window=1),
    "window and sink tokens": Case(((60, 3), (61, 1), (2, 1), (0, 30)), window=9, num_sink_tokens=5),
    "sink tokens over two blocks": Case(((60, 3), (61, 1)), window=9, num_sink_tokens=11),
    "sink logits": Case(MIXED, window=11, sink_logits=True),
    "softcap": Case(MIXED, softcap=1.5),
    "softcap and sink logits": Case(MIXED, window=11, softcap=1.5, sink_logits=True),
    "one head": Case(MIXED, num_kv_heads=1, queries_per_head=1),
    "seven queries per head": Case(MIXED, queries_per_head=7, num_kv_heads=3),
    "one token": Case(((0, 1),), num_layers=1, layer=0),
    "one element": Case(((0, 1),), block_size=1, num_kv_heads=1, queries_per_head=1, head_dim=1, num_layers=1, layer=0),
    "last layer of a slot": Case(MIXED, layer=2),
    "block of one token": Case(MIXED, block_size=1, window=5),
    "prime block": Case(MIXED, block_size=13, window=17),
    "decode alone": Case(((5, 1), (0, 1), (19, 1))),
    "an empty run": Case(((5, 0), (9, 1), (4, 3), (2, 0))),
    "decode in several buckets": Case(((400, 1), (3, 1), (390, 1), (5, 1), (9, 1), (200, 1), (1, 1)), head_dim=4),
    "decode in one padded bucket": Case(((100, 1), (95, 1), (70, 1)), head_dim=4),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_dense_attention(name: str) -> None:
    world = World(CASES[name])
    np.testing.assert_allclose(world.actual(), world.expected(), atol=3e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("sink_logits", [False, True])
def test_agrees_in_half_precision(dtype: torch.dtype, tolerance: float, sink_logits: bool) -> None:
    world = World(Case(MIXED, window=11, sink_logits=sink_logits, dtype=dtype))
    np.testing.assert_allclose(world.actual(), world.expected(), atol=tolerance, rtol=0)


@pytest.mark.parametrize("window", [None, 6])
def test_tiles_of_queries_do_not_change_the_result(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_QUERIES", 4)
    world = World(Case(((0, 13), (9, 7), (30, 4), (11, 1)), window=window))
    np.testing.assert_allclose(world.actual(), world.expected(), atol=3e-6, rtol=0)


@given(
    runs=st.lists(st.tuples(st.integers(0, 45), st.integers(0, 9)), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 2, 5, 8]),
    window=st.none() | st.integers(1, 30),
    num_sink_tokens=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_any_batch_agrees_with_dense_attention(
    runs: list[tuple[int, int]], block_size: int, window: int | None, num_sink_tokens: int
) -> None:
    world = World(Case(tuple(runs), block_size, window, num_sink_tokens, head_dim=3, num_kv_heads=1))
    np.testing.assert_allclose(world.actual(), world.expected(), atol=3e-6, rtol=0)


def test_a_window_off_by_one_is_noticed() -> None:
    world = World(Case(MIXED, window=11))
    world.batch = PagedBatch(world.batch.runs, 8, 10, 0)
    assert np.abs(world.actual() - world.expected()).max() > 1e-2


def test_a_workspace_may_serve_plan_after_plan() -> None:
    workspace = Workspace()
    for name in ("full attention", "one element", "decode in several buckets", "window"):
        world = World(CASES[name])
        np.testing.assert_allclose(world.actual(workspace), world.expected(), atol=3e-6, rtol=0)


def test_writes_touch_nothing_but_the_new_tokens() -> None:
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


def test_a_block_without_a_slot_is_never_read() -> None:
    world = World(Case(((20, 1),)))
    world.tables[0][1] = -1
    with pytest.raises(AssertionError, match="has no slot"):
        world.actual()


def test_the_null_slot_is_the_caches() -> None:
    assert NULL_SLOT == CACHE_NULL_SLOT


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        ops.backend(torch.device("meta"))
