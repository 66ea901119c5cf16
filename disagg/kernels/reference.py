"""Paged attention in torch operations: what every other implementation is compared with, and what serves CPUs.

A pool is read as rows of `block_size * head_dim` elements, one per (slot, K or V, kv head), counted from the layer's
first element: row = slot * rows_per_slot + kv * num_kv_heads + head. Selecting rows is a memcpy each, twice as fast as
indexing the five-dimensional view, and the row numbers are the same for every layer of a group.

Query heads that share a kv head are packed as query rows, so K and V are never repeated. Decode queries (runs of one)
are batched with tables padded by the NULL slot, in buckets of similar length; longer runs go one by one in tiles of
queries, so that a windowed layer touches only the keys near a tile and a mask stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from disagg.kernels.batch import NULL_SLOT, PagedBatch, QueryRun
from disagg.kernels.qkv import HeadNorms, Rotary
from disagg.kernels.scales import KVScales, quantise, raw
from disagg.kernels.workspace import Workspace

NAME = "torch"
# Queries per tile: large enough that a tile's matmuls dwarf its dozen calls, small against usual windows (512 to 4096).
TILE_QUERIES = 256
# Decode rows share a bucket until padding would read this many blocks for nothing: the cost of another bucket's calls.
MAX_PADDING_BLOCKS = 32

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Decode queries with tables of similar length. `queries` None: the batch is this bucket, in order."""

    queries: torch.Tensor | None  # int64 [B], flat index of each query
    key_rows: torch.Tensor  # int64 [B * num_kv_heads * num_blocks]
    bias: torch.Tensor  # [B, 1, 1, num_blocks * block_size], 0 or -inf
    num_queries: int


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries [first, last) of the batch against gathered keys [low, high). `bias` is `[last - first, high - low]`."""

    first: int
    last: int
    low: int
    high: int
    bias: torch.Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """One run of several queries: its blocks are gathered once and serve all its tiles."""

    key_rows: torch.Tensor  # int64 [num_kv_heads * num_blocks]
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the layers of one group share during a step. `write_rows` `[2 * H * N]` counts rows of head_dim elements."""

    write_rows: torch.Tensor
    buckets: tuple[Bucket, ...]
    runs: tuple[Run, ...]
    workspace: Workspace


def plan(batch: PagedBatch, pool: torch.Tensor, dtype: torch.dtype, workspace: Workspace) -> Plan:
    return _Planner(batch, pool, dtype).plan(workspace)


def retarget(plan: Plan, batch: PagedBatch, pool: torch.Tensor) -> Plan:
    return _Planner(batch, pool, torch.float32).retarget(plan)


class _Planner:
    def __init__(self, batch: PagedBatch, pool: torch.Tensor, dtype: torch.dtype) -> None:
        self.batch, self.device, self.dtype = batch, pool.device, dtype
        _, _, self.num_kv_heads, self.block_size, head_dim = pool.shape
        assert self.block_size == batch.block_size
        self.rows_per_slot = pool.stride(0) // (self.block_size * head_dim)

    def plan(self, workspace: Workspace) -> Plan:
        decode, long = self._split()
        runs = tuple(self._run(at, run) for at, run in long)
        return Plan(self._write_rows(), tuple(map(self._bucket, self._buckets(decode))), runs, workspace)

    def retarget(self, plan: Plan) -> Plan:
        """Row numbers anew; the masks stay, which depend on ordinals alone."""
        decode, long = self._split()
        buckets = [
            replace(bucket, key_rows=self._key_rows(self._bucket_slots(rows)[1]))
            for bucket, rows in zip(plan.buckets, self._buckets(decode), strict=True)
        ]
        runs = [
            replace(done, key_rows=self._key_rows(self.batch.slots(run, self.batch.ordinals(run))))
            for done, (_, run) in zip(plan.runs, long, strict=True)
        ]
        return replace(plan, write_rows=self._write_rows(), buckets=tuple(buckets), runs=tuple(runs))

    def _split(self) -> tuple[list[tuple[int, QueryRun]], list[tuple[int, QueryRun]]]:
        """Runs of one query and longer ones, with the flat index of their first query."""
        flat = np.cumsum([0, *(run.num_queries for run in self.batch.runs)])
        placed = [(int(at), run) for at, run in zip(flat, self.batch.runs, strict=False)]
        decode = [pair for pair in placed if pair[1].num_queries == 1]
        return decode, [pair for pair in placed if pair[1].num_queries > 1]

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _bias(self, allowed: npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(
            self._tensor(~allowed), float("-inf")
        )

    def _write_rows(self) -> torch.Tensor:
        rows: list[Int64] = [np.empty(0, np.int64)]
        for run in self.batch.runs:
            positions = np.arange(run.start, run.end)
            slots = self.batch.slots(run, positions // self.block_size)
            rows.append(slots * self.rows_per_slot * self.block_size + positions % self.block_size)
        heads = np.arange(2 * self.num_kv_heads) * self.block_size
        return self._tensor((heads[:, None] + np.concatenate(rows)).ravel())

    def _key_rows(self, slots: Int64) -> torch.Tensor:
        """Rows of K for `slots` `[..., num_blocks]`, ordered `[..., num_kv_heads, num_blocks]`."""
        heads = np.arange(self.num_kv_heads)[:, None]
        return self._tensor((slots[..., None, :] * self.rows_per_slot + heads).ravel())

    def _key_positions(self, ordinals: Int64) -> Int64:
        return (ordinals[..., None] * self.block_size + np.arange(self.block_size)).reshape(*ordinals.shape[:-1], -1)

    def _buckets(self, decode: list[tuple[int, QueryRun]]) -> list[list[tuple[Int64, int, QueryRun]]]:
        """(ordinals, flat index, run) of each decode query, in buckets."""
        rows = sorted(((self.batch.ordinals(run), at, run) for at, run in decode), key=lambda row: len(row[0]))
        buckets: list[list[tuple[Int64, int, QueryRun]]] = []
        padding = 0
        for row in rows:
            if buckets:
                padding += (len(row[0]) - len(buckets[-1][-1][0])) * len(buckets[-1])
            if not buckets or padding > MAX_PADDING_BLOCKS:
                buckets.append([])
                padding = 0
            buckets[-1].append(row)
        return [sorted(bucket, key=lambda row: row[1]) for bucket in buckets]

    def _bucket_slots(self, rows: list[tuple[Int64, int, QueryRun]]) -> tuple[Int64, Int64]:
        """(ordinals, slots) `[B, num_blocks]`, padded."""
        width = max(len(ordinals) for ordinals, _, _ in rows)
        slots = np.full((len(rows), width), NULL_SLOT, np.int64)
        # Padding stands after every query, where the causal mask hides it.
        ordinals = np.full((len(rows), width), 1 + max(run.end for _, _, run in rows) // self.block_size, np.int64)
        for i, (own, _, run) in enumerate(rows):
            slots[i, : len(own)] = self.batch.slots(run, own)
            ordinals[i, : len(own)] = own
        return ordinals, slots

    def _bucket(self, rows: list[tuple[Int64, int, QueryRun]]) -> Bucket:
        ordinals, slots = self._bucket_slots(rows)
        queries = np.array([[run.start] for _, _, run in rows])
        bias = self._bias(self.batch.allowed(queries, self._key_positions(ordinals)))
        whole = len(rows) == self.batch.num_queries
        index = None if whole else self._tensor(np.array([at for _, at, _ in rows]))
        return Bucket(index, self._key_rows(slots), bias[:, None, None, :], len(rows))

    def _run(self, at: int, run: QueryRun) -> Run:
        ordinals = self.batch.ordinals(run)
        keys = self._key_positions(ordinals)
        tiles = []
        for first in range(0, run.num_queries, TILE_QUERIES):
            last = min(first + TILE_QUERIES, run.num_queries)
            queries = np.arange(run.start + first, run.start + last)
            allowed = self.batch.allowed(queries[:, None], keys)
            seen = np.flatnonzero(allowed.any(0))
            low, high = int(seen[0]), int(seen[-1]) + 1
            tiles.append(Tile(at + first, at + last, low, high, self._bias(allowed[:, low:high])))
        return Run(self._key_rows(self.batch.slots(run, ordinals)), tuple(tiles))


def preprocess_qkv(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    plan: Plan,
    num_heads: int,
    bias: torch.Tensor | None,
    norms: HeadNorms | None,
    angles: Rotary | None,
    scales: KVScales | None,
) -> torch.Tensor:
    num_kv_heads, head_dim = pool.shape[2], pool.shape[4]
    x = (qkv.float() if bias is None else qkv.float() + bias.float()).view(len(qkv), -1, head_dim)
    parts = list(torch.split(x, [num_heads, num_kv_heads, num_kv_heads], dim=1))
    if norms is not None:
        for kind, gain in enumerate(norms.gains):
            if norms.normed[kind]:
                squares = parts[kind].square().mean(-1, keepdim=True)
                parts[kind] = parts[kind] * torch.rsqrt(squares + norms.epsilon) * gain
    if angles is not None:
        parts[:2] = [_rotate(part, angles) for part in parts[:2]]
    query, key, value = parts
    write_kv(pool, plan, key, value, scales)
    return query.to(qkv.dtype)


def _rotate(x: torch.Tensor, angles: Rotary) -> torch.Tensor:
    half = angles.cos.shape[1]
    cos, sin = angles.cos[:, None], angles.sin[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _rows(pool: torch.Tensor, width: int) -> torch.Tensor:
    """`pool` as rows of `width` elements that start at its first one, up to the end of its last slot's V."""
    nelements = (pool.shape[0] - 1) * pool.stride(0) + pool[0].numel()
    return pool.as_strided((nelements // width, width), (width, 1))


def write_kv(pool: torch.Tensor, plan: Plan, key: torch.Tensor, value: torch.Tensor, scales: KVScales | None) -> None:
    both = torch.stack([key.transpose(0, 1), value.transpose(0, 1)])
    scale = None if scales is None else torch.stack([scales.key, scales.value])[:, :, None, None]
    kv, head_dim = quantise(both, pool.dtype, scale).reshape(-1, pool.shape[4]), pool.shape[4]
    rows = _rows(pool, head_dim)
    raw(rows).index_copy_(0, plan.write_rows, raw(kv))  # torch has no index_copy_ for eight-bit floats


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    plan: Plan,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    scales: KVScales | None,
) -> torch.Tensor:
    if scales is not None:  # q·(k s) = (q s)·k, and the weights of a head's values share its scale
        key_scale, value_scale = (
            s.repeat_interleave(query.shape[1] // pool.shape[2]) for s in (scales.key, scales.value)
        )
        scaled = (query.float() * key_scale[:, None]).to(query.dtype)
        out = paged_attention(scaled, pool, plan, scale, softcap, sink_logits, None)
        return (out.float() * value_scale[:, None]).to(query.dtype)
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads, block_size = pool.shape[2], pool.shape[3]
    # [N, kv head, query head of that kv head, D]
    grouped = query.reshape(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    sinks = None if sink_logits is None else sink_logits.float().view(num_kv_heads, num_heads // num_kv_heads, 1)
    rows = _rows(pool, block_size * head_dim)
    out = torch.empty_like(grouped)
    for bucket in plan.buckets:
        shape = (bucket.num_queries, num_kv_heads, -1, head_dim)
        key, value = _gather(plan.workspace, rows, bucket.key_rows, num_kv_heads, shape, query.dtype)
        part = grouped if bucket.queries is None else grouped.index_select(0, bucket.queries)
        result = _attend(part, key, value, bucket.bias, scale, softcap, sinks)
        if bucket.queries is None:
            return result.reshape(num_queries, num_heads, head_dim)
        out.index_copy_(0, bucket.queries, result)
    for run in plan.runs:
        key, value = _gather(
            plan.workspace, rows, run.key_rows, num_kv_heads, (num_kv_heads, 1, -1, head_dim), query.dtype
        )
        for tile in run.tiles:
            part = grouped[tile.first : tile.last].permute(1, 2, 0, 3)
            keys, values = (x[:, :, tile.low : tile.high].expand(-1, part.shape[1], -1, -1) for x in (key, value))
            result = _attend(part, keys, values, tile.bias, scale, softcap, None if sinks is None else sinks[..., None])
            out[tile.first : tile.last] = result.permute(2, 0, 1, 3)
    return out.reshape(num_queries, num_heads, head_dim)


def _gather(
    workspace: Workspace,
    rows: torch.Tensor,
    key_rows: torch.Tensor,
    num_kv_heads: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a bucket or run as `shape`; good until the next gather."""
    key, value = (workspace.rows(name, len(key_rows), rows) for name in ("key", "value"))
    torch.index_select(rows, 0, key_rows, out=key)
    torch.index_select(rows, 0, key_rows + num_kv_heads, out=value)
    return key.view(shape).to(dtype), value.view(shape).to(dtype)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`[..., n, D]` queries over `[..., L, D]` keys; `bias` broadcasts to `[..., n, L]`, `sinks` to `[..., n, 1]`."""
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[-2]]
    return weights.to(value.dtype) @ value


def gather_slots(memory: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.index_select(memory, 0, slots, out=out)


def scatter_slots(memory: torch.Tensor, slots: torch.Tensor, staging: torch.Tensor) -> None:
    memory.index_copy_(0, slots, staging)


def copy_units(
    source: torch.Tensor,
    source_at: torch.Tensor,
    target: torch.Tensor,
    target_at: torch.Tensor,
    unit: int,
    source_scales: torch.Tensor | None,
    target_scales: torch.Tensor | None,
) -> None:
    steps = torch.arange(unit, device=source.device)
    # [n, unit, layers, 2, heads, dim]: indexes that slices stand between come first
    values = raw(source)[source_at[:, :1], :, :, :, source_at[:, 1:] + steps].view(source.dtype)
    if source_scales is not None:
        values = values.float() * source_scales[..., None]
    values = quantise(values, target.dtype, None if target_scales is None else target_scales[..., None])
    raw(target)[target_at[:, :1], :, :, :, target_at[:, 1:] + steps] = raw(values)
