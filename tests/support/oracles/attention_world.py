"""Random sequences in a paged pool, and a token-walking dense oracle in float64 that knows nothing of blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from disagg.kernels import ops
from disagg.kernels.batch import NULL_SLOT, PagedBatch, QueryRun
from disagg.kernels.scales import INT8_NAN, KVScales, dequantise, quantise, raw
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
    stored: torch.dtype | None = None  # the pool's, where it is not that of the queries
    scaled: bool = False
    unseen: float = 0.0  # what live blocks hold at positions that no query sees

    def sees(self, query: int, key: int) -> bool:
        in_window = self.window is None or key > query - self.window
        return key <= query and (in_window or key < self.num_sink_tokens)


class World:
    """Random keys and values of every sequence, those before `start` laid out in shuffled slots, all else NaN."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.stored = case.stored or case.dtype
        rng = np.random.default_rng(7)
        self.rng = rng
        shape = (case.num_kv_heads, case.head_dim)
        self.scales = self._scales() if case.scaled else None
        self.keys = [self._storable(rng.standard_normal((start + n, *shape)), 0) for start, n in case.runs]
        self.values = [self._storable(rng.standard_normal((start + n, *shape)), 1) for start, n in case.runs]
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

    def _scales(self) -> KVScales:
        key, value = (0.01 + torch.from_numpy(self.rng.random(self.case.num_kv_heads)).float() for _ in range(2))
        return KVScales(key.to(self.device), value.to(self.device))

    def _scale(self, which: int) -> torch.Tensor:
        assert self.scales is not None
        return (self.scales.key, self.scales.value)[which].cpu()[:, None]

    def _storable(self, x: np.ndarray, which: int) -> np.ndarray:
        """`x` as eight bits hold it; wider dtypes round once more on their way in, within the tests' tolerance."""
        if self.case.stored is None:
            return x
        scale = self._scale(which) if self.scales else None
        held = dequantise(quantise(torch.from_numpy(x), self.stored, scale), torch.float64)
        return (held if scale is None else held * scale).numpy()

    def _lay_out(self) -> tuple[torch.Tensor, list[np.ndarray]]:
        case, size = self.case, self.case.block_size
        needed = [self._seen(start, n) for start, n in case.runs]
        num_slots = 2 + sum(len({key // size for key in seen}) for seen in needed) + 3
        slots = iter(self.rng.permutation(np.arange(2, num_slots)))
        shape = (num_slots, case.num_layers, 2, case.num_kv_heads, size, case.head_dim)
        nan = INT8_NAN if self.stored == torch.int8 else math.nan
        memory = torch.full(shape, nan, dtype=self.stored)
        memory[NULL_SLOT] = 0
        tables = []
        for seen, (start, n), keys, values in zip(needed, case.runs, self.keys, self.values, strict=True):
            table = np.full(-(-(start + n) // size), -1, np.int32)
            for ordinal in sorted({key // size for key in seen}):
                table[ordinal] = next(slots)
                memory[table[ordinal]] = case.unseen
                for position in range(ordinal * size, min((ordinal + 1) * size, start)):
                    if position in seen or not math.isnan(case.unseen):
                        block = memory[table[ordinal], case.layer, :, :, position % size]
                        block.copy_(self._stored(keys[position], values[position]))
            tables.append(table)
        return memory.to(self.device)[:, case.layer], tables

    def _stored(self, key: np.ndarray, value: np.ndarray) -> torch.Tensor:
        both = [torch.from_numpy(x) for x in (key, value)]
        scales = [self._scale(which) if self.scales else None for which in (0, 1)]
        return torch.stack([quantise(x, self.stored, scale) for x, scale in zip(both, scales, strict=True)])

    def _seen(self, start: int, n: int) -> set[int]:
        """Positions that some query of the run sees, and those that it writes."""
        queries = range(start, start + n)
        return {key for query in queries for key in range(start + n) if self.case.sees(query, key)}

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

    def new(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the queries' own tokens, `[num_queries, num_kv_heads, head_dim]`."""
        part = [slice(start, start + n) for start, n in self.case.runs]
        shape = (-1, self.case.num_kv_heads, self.case.head_dim)
        key, value = (
            torch.from_numpy(np.concatenate([x[cut] for x, cut in zip(xs, part, strict=True)])).view(shape)
            for xs in (self.keys, self.values)
        )
        return key.to(self.device, self.case.dtype), value.to(self.device, self.case.dtype)

    def moved(self) -> tuple[PagedBatch, torch.Tensor]:
        """The same batch over a pool of its own, in which every block lies in another slot."""
        pool = torch.empty_strided(self.pool.shape, self.pool.stride(), dtype=self.stored, device=self.device)
        raw(pool).copy_(torch.cat([raw(self.pool)[:2], raw(self.pool)[2:].roll(1, 0)]))
        slots = np.roll(np.arange(2, len(pool), dtype=np.int32), -1)
        tables = [np.where(run.table < 0, -1, slots[run.table - 2]).astype(np.int32) for run in self.batch.runs]
        runs = tuple(replace(run, table=table) for run, table in zip(self.batch.runs, tables, strict=True))
        return replace(self.batch, runs=runs), pool

    def actual_of_moved(self) -> np.ndarray:
        """What a plan of this batch answers once it was retargeted to where the blocks were moved."""
        plan = ops.plan(self.batch, self.pool, self.case.dtype, Workspace())
        batch, pool = self.moved()
        plan = ops.retarget(plan, batch, pool)
        ops.write_kv(pool, plan, *self.new(), scales=self.scales)
        query = torch.from_numpy(self.queries).to(self.device, self.case.dtype)
        out = ops.paged_attention(query, pool, plan, scale=self.case.head_dim**-0.5, scales=self.scales)
        return out.double().cpu().numpy()

    def actual(self, workspace: Workspace | None = None, *, transposed: bool = False) -> np.ndarray:
        """What `ops` answer. `transposed`: the query as models hand it over, heads outermost in memory."""
        case = self.case
        plan = ops.plan(self.batch, self.pool, case.dtype, workspace or Workspace())
        ops.write_kv(self.pool, plan, *self.new(), scales=self.scales)
        query = torch.from_numpy(self.queries).to(self.device, case.dtype)
        if transposed:
            query = query.transpose(0, 1).contiguous().transpose(0, 1)
        sinks = None if self.sink_logits is None else torch.from_numpy(self.sink_logits).float().to(self.device)
        out = ops.paged_attention(
            query,
            self.pool,
            plan,
            scale=case.head_dim**-0.5,
            softcap=case.softcap,
            sink_logits=sinks,
            scales=self.scales,
        )
        assert out.shape == self.queries.shape
        return out.double().cpu().numpy()


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
"""Every feature once, in float32."""
