"""Paged attention in torch operations: what every other implementation is compared with, and what serves CPUs.

A pool is read as rows of `block_size * head_dim` elements, one per (slot, K or V, kv head), counted from the layer's
first element: row = slot * rows_per_slot + kv * num_kv_heads + head. Selecting rows is a memcpy each, twice as fast as
indexing the five-dimensional view, and the row numbers are the same for every layer of a group.

Query heads that share a kv head are packed as query rows, so K and V are never repeated. Decode queries (runs of one)
are batched with tables padded by the NULL slot, in buckets of similar length; longer runs go one by one in tiles of
queries, so that a windowed layer touches only the keys near a tile and a mask stays small.

Where the compiled helper is loaded and serves the types, decode queries and writes go there (`native_attention`),
which needs neither row numbers nor buckets. So do longer runs in float32 (`native_prefill`), and the fused step before
attention (`native_layers`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from disagg.kernels import native_attention, native_layers, native_prefill
from disagg.kernels.batch import NULL_SLOT, PagedBatch, QueryRun
from disagg.kernels.qkv import HeadNorms, Rotary
from disagg.kernels.scales import KVScales, dequantise, quantise, raw
from disagg.kernels.table_rows import TableRows
from disagg.kernels.workspace import Workspace

NAME = "torch"
# Queries per tile: large enough that a tile's matmuls dwarf its dozen calls, small against usual windows (512 to 4096).
TILE_QUERIES = 256
# Decode rows share a bucket until padding would read this many blocks for nothing: the cost of another bucket's calls.
MAX_PADDING_BLOCKS = 32
# What a bucket gathers is read again at once, so it should still be in the cache: measured, buckets of 4 MiB take 20 to
# 30 % less than one of 16 or 32 MiB (1 MiB of L2, 32 of L3), smaller ones lose it again in calls.
MAX_BUCKET_NBYTES = 4 << 20

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Decode queries with tables of similar length. `queries` None: the batch is this bucket, in order."""

    queries: torch.Tensor | None  # int64 [B], flat index of each query
    rows: torch.Tensor  # int64 [2 * B * num_kv_heads * num_blocks], those of K, then those of V
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

    rows: torch.Tensor  # int64 [2 * num_kv_heads * num_blocks], those of K, then those of V
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)  # no slots: `index` is kept
class Writes:
    """Where the batch's K and V go, in rows of head_dim elements: `rows` int64 `[N]` for K of kv head 0."""

    rows: Int64
    num_kv_heads: int
    block_size: int
    head_dim: int
    device: torch.device

    @cached_property
    def elements(self) -> Int64:
        """Elements of a pool where K of kv head 0 goes, int64 `[N]`; the same for every layer of the group."""
        return self.rows * self.head_dim

    @cached_property
    def index(self) -> torch.Tensor:
        """Rows of all, `[2 * num_kv_heads * N]`: K and V, then heads, then tokens."""
        heads = np.arange(2 * self.num_kv_heads) * self.block_size
        return torch.from_numpy((heads[:, None] + self.rows).ravel()).to(self.device)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the layers of one group share during a step. Decode queries are in `decodes` or in `buckets`."""

    writes: Writes
    decodes: native_attention.DecodeRows | None
    buckets: tuple[Bucket, ...]
    runs: tuple[Run | native_prefill.NativeRun, ...]
    workspace: Workspace


def plan(batch: PagedBatch, pool: torch.Tensor, dtype: torch.dtype, workspace: Workspace) -> Plan:
    group = (pool.data_ptr(), pool.shape, pool.dtype, batch.window, batch.num_sink_tokens)
    return _Planner(batch, pool, dtype, workspace.table_rows(group)).plan(workspace)


def retarget(plan: Plan, batch: PagedBatch, pool: torch.Tensor) -> Plan:
    # The masks, which are of the queries' dtype, stay; the tables lie beside those of the plan.
    return _Planner(batch, pool, pool.dtype, TableRows()).retarget(plan)


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Runs of one query as arrays over B runs: flat index, position, where the run's table begins in `tables`."""

    at: Int64
    starts: Int64
    offsets: Int64
    tables: npt.NDArray[np.int32]
    write_slots: Int64


def _decodes(batch: PagedBatch, placed: list[tuple[int, QueryRun]], kept: TableRows) -> _Decodes:
    """All runs at once: a step builds this once per group, for tens of sequences. `kept`: their tables so far."""
    at = np.array([at for at, _ in placed], np.int64)
    starts = np.array([run.start for _, run in placed], np.int64)
    lengths = np.array([len(run.table) for _, run in placed], np.int64)
    own = starts // batch.block_size
    assert (own < lengths).all()
    offsets = kept.place([run.table for _, run in placed])
    tables = kept.entries.reshape(-1)
    write_slots = tables[offsets + own].astype(np.int64)
    assert (write_slots > NULL_SLOT).all(), "a query's own block has no slot"
    return _Decodes(at, starts, offsets, tables, write_slots)


@dataclass(frozen=True, slots=True)
class _Padded:
    """What each of B decode queries attends to, `[B, num_blocks]`, padded to the longest.

    Padding has the NULL slot and stands after every query, where the causal mask hides it.
    """

    counts: Int64
    ordinals: Int64
    slots: Int64


def _padded(batch: PagedBatch, decodes: _Decodes) -> _Padded:
    own = decodes.starts // batch.block_size
    firsts, sinks = batch.first_ordinals(decodes.starts)
    counts = sinks + own + 1 - firsts
    columns = np.arange(counts.max())
    ordinals = columns + np.where(columns < sinks[:, None], 0, (firsts - sinks)[:, None])
    is_padding = columns >= counts[:, None]
    slots = decodes.tables[decodes.offsets[:, None] + np.where(is_padding, 0, ordinals)].astype(np.int64)
    slots[is_padding] = NULL_SLOT
    ordinals[is_padding] = own.max() + 1
    assert ((slots > NULL_SLOT) | is_padding).all(), "a query needs a block that has no slot"
    return _Padded(counts, ordinals, slots)


class _Planner:
    def __init__(self, batch: PagedBatch, pool: torch.Tensor, dtype: torch.dtype, kept: TableRows) -> None:
        self.batch, self.pool, self.device, self.dtype = batch, pool, pool.device, dtype
        _, _, self.num_kv_heads, self.block_size, head_dim = pool.shape
        assert self.block_size == batch.block_size
        self.rows_per_slot = pool.stride(0) // (self.block_size * head_dim)
        self.block_nbytes = 2 * self.num_kv_heads * self.block_size * head_dim * pool.element_size()
        flat = np.cumsum([0, *(run.num_queries for run in batch.runs)])
        placed = [(int(at), run) for at, run in zip(flat, batch.runs, strict=False)]
        decode = [pair for pair in placed if pair[1].num_queries == 1]
        self.long = [pair for pair in placed if pair[1].num_queries > 1]
        self.decodes = _decodes(batch, decode, kept) if decode else None

    def plan(self, workspace: Workspace) -> Plan:
        is_native = native_attention.serves(self.pool, self.dtype)
        rows = self._decode_rows() if is_native else None
        buckets = () if is_native else tuple(self._bucket(members) for members in self._buckets())
        return Plan(self._writes(), rows, buckets, tuple(self._run(at, run) for at, run in self.long), workspace)

    def retarget(self, plan: Plan) -> Plan:
        """Row numbers anew; the masks stay, which depend on ordinals alone."""
        buckets = [
            replace(bucket, rows=self._rows(self._bucket_slots(members)))
            for bucket, members in zip(plan.buckets, self._buckets() if plan.buckets else (), strict=True)
        ]
        runs = [self._moved(done, at, run) for done, (at, run) in zip(plan.runs, self.long, strict=True)]
        rows = None if plan.decodes is None else self._decode_rows()
        return replace(plan, writes=self._writes(), decodes=rows, buckets=tuple(buckets), runs=tuple(runs))

    def _moved(self, done: Run | native_prefill.NativeRun, at: int, run: QueryRun) -> Run | native_prefill.NativeRun:
        if isinstance(done, native_prefill.NativeRun):
            return native_prefill.NativeRun(at, run, self.batch.window or 0)
        return replace(done, rows=self._rows(self.batch.slots(run, self.batch.ordinals(run))))

    def _tensor(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _bias(self, allowed: npt.NDArray[np.bool_]) -> torch.Tensor:
        bias = np.where(allowed, np.float32(0), np.float32(-np.inf))
        return self._tensor(bias).to(self.dtype)

    def _decode_rows(self) -> native_attention.DecodeRows | None:
        made = self.decodes
        if made is None:
            return None
        return native_attention.decode_rows(self.batch, made.at, made.starts, made.tables, made.offsets, self.pool)

    @cached_property
    def _padded(self) -> _Padded:
        assert self.decodes is not None
        return _padded(self.batch, self.decodes)

    def _writes(self) -> Writes:
        rows = np.empty(self.batch.num_queries, np.int64)
        per_slot = self.rows_per_slot * self.block_size
        if self.decodes is not None:
            rows[self.decodes.at] = self.decodes.write_slots * per_slot + self.decodes.starts % self.block_size
        for at, run in self.long:
            positions = np.arange(run.start, run.end)
            slots = self.batch.slots(run, positions // self.block_size)
            rows[at : at + run.num_queries] = slots * per_slot + positions % self.block_size
        return Writes(rows, self.num_kv_heads, self.block_size, self.pool.shape[4], self.device)

    def _rows(self, slots: Int64) -> torch.Tensor:
        """Rows of K, then of V, for `slots` `[..., num_blocks]`, each ordered `[..., num_kv_heads, num_blocks]`."""
        heads = np.arange(2 * self.num_kv_heads).reshape(2, *(1,) * (slots.ndim - 1), self.num_kv_heads, 1)
        return self._tensor((slots[..., None, :] * self.rows_per_slot + heads).ravel())

    def _key_positions(self, ordinals: Int64) -> Int64:
        return (ordinals[..., None] * self.block_size + np.arange(self.block_size)).reshape(*ordinals.shape[:-1], -1)

    def _buckets(self) -> list[Int64]:
        """Members of each bucket, as indexes of decode queries in flat order: cut where padding or size is too much."""
        if self.decodes is None:
            return []
        order = np.argsort(self._padded.counts, kind="stable")
        counts = self._padded.counts[order].tolist()
        cuts, begin, padding = [], 0, 0
        for i in range(1, len(counts)):
            padding += (counts[i] - counts[i - 1]) * (i - begin)
            if padding > MAX_PADDING_BLOCKS or counts[i] * (i + 1 - begin) * self.block_nbytes > MAX_BUCKET_NBYTES:
                cuts.append(i)
                begin, padding = i, 0
        return [np.sort(members) for members in np.split(order, cuts)]

    def _bucket_slots(self, members: Int64) -> Int64:
        return self._padded.slots[members, : self._padded.counts[members].max()]

    def _bucket(self, members: Int64) -> Bucket:
        assert self.decodes is not None
        slots = self._bucket_slots(members)
        bias = self._bias(self._allowed(members, slots.shape[1]))
        index = None if len(members) == self.batch.num_queries else self._tensor(self.decodes.at[members])
        return Bucket(index, self._rows(slots), bias[:, None, None, :], len(members))

    def _allowed(self, members: Int64, width: int) -> npt.NDArray[np.bool_]:
        """Which of `width` blocks' keys each member attends to: as `batch.allowed` says.

        Without sink blocks a row's keys are consecutive positions, so two comparisons of small columns say it.
        """
        assert self.decodes is not None
        starts, ordinals = self.decodes.starts[members, None], self._padded.ordinals[members, :width]
        if self.batch.num_sink_tokens:
            return self.batch.allowed(starts, self._key_positions(ordinals))
        columns = np.arange(width * self.block_size, dtype=np.int32)
        own = (starts - ordinals[:, :1] * self.block_size).astype(np.int32)  # the column of the query's own key
        allowed: npt.NDArray[np.bool_] = columns <= own
        if self.batch.window is not None:
            allowed &= columns > own - self.batch.window
        return allowed

    def _run(self, at: int, run: QueryRun) -> Run | native_prefill.NativeRun:
        if native_prefill.serves(self.pool, self.dtype, self.batch):
            return native_prefill.NativeRun(at, run, self.batch.window or 0)
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
        return Run(self._rows(self.batch.slots(run, ordinals)), tuple(tiles))


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
    if scales is None and isinstance(plan, Plan) and native_layers.serves_qkv(qkv, pool):
        return native_layers.preprocess_qkv(qkv, pool, plan.writes.elements, num_heads, bias, norms, angles)
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
    if scales is None and native_attention.can_write(pool, key, value):
        native_attention.write(pool, plan.writes.elements, key, value)
        return
    both = torch.stack([key.transpose(0, 1), value.transpose(0, 1)])
    scale = None if scales is None else torch.stack([scales.key, scales.value])[:, :, None, None]
    if scales is not None:
        scales.count_saturated(both, pool.dtype)
    kv, head_dim = quantise(both, pool.dtype, scale).reshape(-1, pool.shape[4]), pool.shape[4]
    rows = _rows(pool, head_dim)
    raw(rows).index_copy_(0, plan.writes.index, raw(kv))  # torch has no index_copy_ for eight-bit floats


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    plan: Plan,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    scales: KVScales | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if out is not None:
        return out.copy_(paged_attention(query, pool, plan, scale, softcap, sink_logits, scales))
    if scales is not None:  # q·(k s) = (q s)·k, and the weights of a head's values share its scale
        key_scale, value_scale = (
            s.repeat_interleave(query.shape[1] // pool.shape[2]) for s in (scales.key, scales.value)
        )
        scaled = (query.float() * key_scale[:, None]).to(query.dtype)
        out = paged_attention(scaled, pool, plan, scale, softcap, sink_logits, None)
        return (out.float() * value_scale[:, None]).to(query.dtype)
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads, block_size = pool.shape[2], pool.shape[3]
    if plan.decodes is not None and not plan.runs:
        out = torch.empty(query.shape, dtype=query.dtype)
        native_attention.attend(query, pool, plan.decodes, scale, softcap, sink_logits, out)
        return out
    # [N, kv head, query head of that kv head, D]
    grouped = query.reshape(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    sinks = None if sink_logits is None else sink_logits.float().view(num_kv_heads, num_heads // num_kv_heads, 1)
    rows = _rows(pool, block_size * head_dim)
    out = torch.empty(grouped.shape, dtype=grouped.dtype, device=grouped.device)
    if plan.decodes is not None:
        made = out.view(query.shape)
        native_attention.attend(query, pool, plan.decodes, scale, softcap, sink_logits, made)
    for bucket in plan.buckets:
        shape = (bucket.num_queries, num_kv_heads, -1, head_dim)
        key, value = _gather(plan.workspace, rows, bucket.rows, shape, query.dtype)
        part = grouped if bucket.queries is None else grouped.index_select(0, bucket.queries)
        result = _attend(part, key, value, bucket.bias, scale, softcap, sinks)
        if bucket.queries is None:
            return result.reshape(num_queries, num_heads, head_dim)
        out.index_copy_(0, bucket.queries, result)
    for run in plan.runs:
        if isinstance(run, native_prefill.NativeRun):
            made = out.view(query.shape)
            native_prefill.attend(query, pool, run, scale, softcap, sink_logits, plan.workspace, made)
            continue
        key, value = _gather(plan.workspace, rows, run.rows, (num_kv_heads, 1, -1, head_dim), query.dtype)
        for tile in run.tiles:
            part = grouped[tile.first : tile.last].permute(1, 2, 0, 3)
            keys, values = (x[:, :, tile.low : tile.high].expand(-1, part.shape[1], -1, -1) for x in (key, value))
            result = _attend(part, keys, values, tile.bias, scale, softcap, None if sinks is None else sinks[..., None])
            out[tile.first : tile.last] = result.permute(2, 0, 1, 3)
    return out.reshape(num_queries, num_heads, head_dim)


def _gather(
    workspace: Workspace, rows: torch.Tensor, wanted: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a bucket or run as `shape`; good until the next gather."""
    both = workspace.rows("kv", len(wanted), rows)
    torch.index_select(rows, 0, wanted, out=both)
    key, value = dequantise(both.view(2, *shape), dtype).unbind()
    return key, value


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
        values = dequantise(values, torch.float32, source_scales[..., None])
    values = quantise(values, target.dtype, None if target_scales is None else target_scales[..., None])
    raw(target)[target_at[:, :1], :, :, :, target_at[:, 1:] + steps] = raw(values)
