"""The operations of `ops` in Triton: each checks what it was given, and launches.

Memory is addressed by strides, so a layer of a coalesced slot, or a transposed query, is read where it lies; only the
last dimension must be contiguous.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton

from disagg.kernels.batch import PagedBatch
from disagg.kernels.device_plan import DevicePlan, device_plan
from disagg.kernels.dispatch import CALLS
from disagg.kernels.qkv import HeadNorms, Rotary
from disagg.kernels.scales import EIGHT_BIT_FLOATS, EIGHT_BITS, KVScales, largest, quantise, raw
from disagg.kernels.triton.attention import attention_kernel, merge_kernel
from disagg.kernels.triton.copies import rows_kernel, units_kernel, write_kernel
from disagg.kernels.triton.launch import Cut, SplitSpace, cut, num_processors, num_splits, power_of_two
from disagg.kernels.triton.qkv import qkv_kernel
from disagg.kernels.workspace import Workspace

NAME: Final = "triton"
INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in the interpreter: decided when they were decorated, by `TRITON_INTERPRET`."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORED = (*FLOATS, *EIGHT_BITS)
QUERIES_PER_PROGRAM: Final = 8  # a head of 128 then makes 1024 elements, 8 per thread
COPY_BLOCK: Final = 2048  # elements that a program copies: 16 of 2 bytes per thread, two vector loads; 16 KiB as int64


def launch(name: str, kernel: Any, grid: tuple[int, ...], *args: object, **constants: object) -> None:
    """Run `kernel` over `grid`, counted; an empty grid launches nothing."""
    if 0 in grid:
        return
    CALLS[f"kernel:{name}"] += 1
    kernel[grid](*args, **constants)


def check_device(*tensors: torch.Tensor | None) -> None:
    """All on one device, and the kernels compiled for it."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    assert len(devices) == 1, f"tensors on several devices: {sorted(map(str, devices))}"
    if not INTERPRETED and devices.pop().type == "cpu":
        raise RuntimeError("Triton runs on cpu only in its interpreter: set TRITON_INTERPRET=1 before it is imported")


def check_rows(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    assert tuple(tensor.shape) == shape, f"{name}: shape {tuple(tensor.shape)}, expected {shape}"
    assert tensor.dtype in dtypes, f"{name}: dtype {tensor.dtype}, expected one of {dtypes}"
    assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or not tensor.numel(), (
        f"{name}: the last dimension is not contiguous"
    )


def plan(batch: PagedBatch, pool: torch.Tensor, dtype: torch.dtype, workspace: Workspace) -> DevicePlan:
    assert pool.shape[3] == batch.block_size
    assert dtype in FLOATS
    return device_plan(batch, pool, workspace)


def retarget(plan: DevicePlan, batch: PagedBatch, pool: torch.Tensor) -> DevicePlan:
    return device_plan(batch, pool, plan.workspace)


def write_kv(
    pool: torch.Tensor, plan: DevicePlan, key: torch.Tensor, value: torch.Tensor, scales: KVScales | None
) -> None:
    num_kv_heads, head_dim, num_queries = pool.shape[2], pool.shape[4], len(plan.write_slots)
    check_rows("pool", pool, (pool.shape[0], 2, num_kv_heads, plan.block_size, head_dim), STORED)
    for name, x in (("key", key), ("value", value)):
        check_rows(name, x, (num_queries, num_kv_heads, head_dim), FLOATS)
    check_device(pool, plan.write_slots, key, value)
    if INTERPRETED and pool.dtype in EIGHT_BIT_FLOATS:
        # The interpreter halves what rounding carries into the next exponent: torch converts, the kernel moves bytes.
        if scales is not None:
            scales.count_saturated(torch.stack([key, value]).transpose(1, 2), pool.dtype)
        key = quantise(key, pool.dtype, None if scales is None else scales.key[:, None]).view(torch.uint8)
        value = quantise(value, pool.dtype, None if scales is None else scales.value[:, None]).view(torch.uint8)
        pool, scales = pool.view(torch.uint8), None
    counter = _counter(pool, scales)
    launch(
        "write_kv",
        write_kernel,
        (num_queries,),
        key,
        value,
        pool,
        plan.write_slots,
        plan.write_offsets,
        *_tensors(scales),
        counter,
        0.0 if pool.dtype == torch.uint8 else largest(pool.dtype),
        *key.stride()[:2],
        *value.stride()[:2],
        *pool.stride()[:4],
        H=num_kv_heads,
        D=head_dim,
        BLOCK=power_of_two(num_kv_heads * head_dim),
        HAS_SCALES=scales is not None,
        SATURATE=pool.dtype in EIGHT_BITS,
        INTEGERS=pool.dtype == torch.int8,
        COUNT=counter is not None,
    )


def preprocess_qkv(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    plan: DevicePlan,
    num_heads: int,
    bias: torch.Tensor | None,
    norms: HeadNorms | None,
    angles: Rotary | None,
    scales: KVScales | None,
) -> torch.Tensor:
    num_queries, num_kv_heads, head_dim = len(plan.write_slots), pool.shape[2], pool.shape[4]
    check_rows("pool", pool, (pool.shape[0], 2, num_kv_heads, plan.block_size, head_dim), STORED)
    check_rows("qkv", qkv, (num_queries, (num_heads + 2 * num_kv_heads) * head_dim), FLOATS)
    if INTERPRETED and pool.dtype in EIGHT_BIT_FLOATS:
        raise RuntimeError(f"Triton's interpreter converts to {pool.dtype} wrongly: convert in torch")
    gains, normed = (None, (False,) * 3) if norms is None else (norms.gains, norms.normed)
    cos, sin = (None, None) if angles is None else (angles.cos, angles.sin)
    check_device(pool, plan.write_slots, qkv, bias, gains, cos, *_tensors(scales))
    half, counter = 0 if cos is None else cos.shape[1], _counter(pool, scales)
    query = torch.empty(num_queries, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    launch(
        "preprocess_qkv",
        qkv_kernel,
        (-(-num_queries // QUERIES_PER_PROGRAM), num_heads + 2 * num_kv_heads),
        *(qkv, None if bias is None else bias.contiguous(), gains, cos, sin),
        *(pool, plan.write_slots, plan.write_offsets, *_tensors(scales), counter, query, num_queries),
        *(0.0 if norms is None else norms.epsilon, largest(pool.dtype)),
        *(qkv.stride(0), *pool.stride()[:4]),
        HQ=num_heads,
        H=num_kv_heads,
        D=head_dim,
        HALF=half,
        HP=power_of_two(half),
        RP=power_of_two(head_dim - 2 * half),
        BLOCK_T=QUERIES_PER_PROGRAM,
        HAS_BIAS=bias is not None,
        NORMED=sum(1 << kind for kind in range(3) if normed[kind]),
        HAS_SCALES=scales is not None,
        SATURATE=pool.dtype in EIGHT_BITS,
        INTEGERS=pool.dtype == torch.int8,
        COUNT=counter is not None,
    )
    return query


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    plan: DevicePlan,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    scales: KVScales | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    num_heads, head_dim, num_kv_heads = query.shape[1], query.shape[2], pool.shape[2]
    check_rows("query", query, (len(plan.write_slots), num_heads, head_dim), FLOATS)
    check_rows("pool", pool, (pool.shape[0], 2, num_kv_heads, plan.block_size, head_dim), STORED)
    assert num_heads % num_kv_heads == 0, f"{num_heads} query heads over {num_kv_heads} kv heads"
    assert sink_logits is None or sink_logits.shape == (num_heads,)
    assert out is None or (out.shape == query.shape and out.dtype == query.dtype and out.is_contiguous())
    check_device(query, pool, plan.table, sink_logits, *_tensors(scales), out)
    call = _Attention(query, pool, plan, scale, softcap, sink_logits, scales, out)
    call.decode()
    call.prefill()
    return call.out


def _tensors(scales: KVScales | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if scales is None else (scales.key, scales.value)


def _counter(pool: torch.Tensor, scales: KVScales | None) -> torch.Tensor | None:
    """Where numbers are counted that the pool's eight bits do not hold."""
    return None if scales is None or pool.dtype not in EIGHT_BITS else scales.saturated


class _Attention:
    """One call: what its launches over decode tiles and over prefill tiles share."""

    def __init__(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        plan: DevicePlan,
        scale: float,
        softcap: float | None,
        sink_logits: torch.Tensor | None,
        scales: KVScales | None,
        out: torch.Tensor | None,
    ) -> None:
        self.query, self.pool, self.plan, self.scale, self.softcap = query, pool, plan, scale, softcap
        self.sink_logits = None if sink_logits is None else sink_logits.float().contiguous()
        self.scales = scales
        self.out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out

    def decode(self) -> None:
        """Runs of one query: as many splits per tile as fill the device, merged by a second kernel."""
        tiles, cut = self.plan.decode_tiles, self._cut(decode=True)
        num_heads, head_dim = self.query.shape[1:]
        splits = num_splits(
            num_programs=len(tiles) * self.pool.shape[2],
            num_keys=self.plan.longest,
            chunk_keys=cut.keys,
            num_processors=num_processors(self.query.device),
        )
        if splits == 1:
            self._run("decode_attention", tiles, cut, 1, (self.out, None, None))
            return
        space = SplitSpace(len(tiles) * num_heads * splits, head_dim)
        parts = space.cut(self.plan.workspace.floats("splits", space.num_elements, self.query.device))
        self._run("decode_attention_split", tiles, cut, splits, parts)
        self._merge(tiles, cut, splits, parts)

    def prefill(self) -> None:
        """Longer runs, in tiles of several queries."""
        if not self.plan.has_prefill:
            return
        cut = self._cut(decode=False)
        self._run("prefill_attention", self.plan.prefill_tiles(cut.num_queries), cut, 1, (self.out, None, None))

    def _cut(self, *, decode: bool) -> Cut:
        _, num_heads, head_dim = self.query.shape
        heads_per_kv = num_heads // self.pool.shape[2]
        return cut(head_dim=head_dim, heads_per_kv=heads_per_kv, itemsize=self.query.element_size(), decode=decode)

    def _run(
        self, name: str, tiles: torch.Tensor, cut: Cut, splits: int, outs: tuple[torch.Tensor | None, ...]
    ) -> None:
        plan, num_kv_heads = self.plan, self.pool.shape[2]
        launch(
            name,
            attention_kernel,
            (len(tiles), num_kv_heads, splits),
            *(self.query, self.pool, plan.table, plan.runs, tiles, self.sink_logits),
            *_tensors(self.scales),
            *outs,
            *(plan.window or 0, plan.num_sink_tokens, self.scale, self.softcap or 0.0, splits),
            *(*self.query.stride()[:2], *self.pool.stride()[:4], plan.table.stride(0)),
            R=self.query.shape[1] // num_kv_heads,
            T=plan.block_size,
            D=self.query.shape[2],
            DP=cut.padded_dim,
            BLOCK_Q=cut.num_queries,
            BLOCK_M=cut.rows,
            BLOCK_N=cut.keys,
            HAS_WINDOW=plan.window is not None,
            HAS_SOFTCAP=self.softcap is not None,
            HAS_SINK_LOGITS=self.sink_logits is not None,
            HAS_SCALES=self.scales is not None,
            INTEGERS=self.pool.dtype == torch.int8,
            SPLIT=splits > 1,
            WIDE=INTERPRETED,
            num_warps=cut.num_warps,
        )

    def _merge(self, tiles: torch.Tensor, cut: Cut, splits: int, parts: tuple[torch.Tensor, ...]) -> None:
        launch(
            "merge_splits",
            merge_kernel,
            (len(tiles), self.query.shape[1]),
            *(*parts, self.plan.runs, tiles, self.sink_logits, self.out, splits),
            D=self.query.shape[2],
            DP=cut.padded_dim,
            SP=power_of_two(splits),
            HAS_SINK_LOGITS=self.sink_logits is not None,
        )


def gather_slots(memory: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    _copy_rows("gather_slots", memory, slots, out, None, len(slots))
    return out


def scatter_slots(memory: torch.Tensor, slots: torch.Tensor, staging: torch.Tensor) -> None:
    _copy_rows("scatter_slots", staging, None, memory, slots, len(slots))


def _copy_rows(
    name: str,
    source: torch.Tensor,
    source_rows: torch.Tensor | None,
    target: torch.Tensor,
    target_rows: torch.Tensor | None,
    num_rows: int,
) -> None:
    check_device(source, source_rows, target, target_rows)
    width = source.shape[1]
    check_rows("source", source, (len(source), width), (torch.uint8,))
    check_rows("target", target, (len(target), width), (torch.uint8,))
    for rows in (source_rows, target_rows):
        assert rows is None or (rows.dtype == torch.int64 and rows.is_contiguous())
    if all(x.storage_offset() % 8 == 0 == x.stride(0) % 8 for x in (source, target)) and width % 8 == 0:
        source, target, width = source.view(torch.int64), target.view(torch.int64), width // 8
    launch(
        name,
        rows_kernel,
        (num_rows, -(-width // COPY_BLOCK)),
        *(source, source_rows, target, target_rows, source.stride(0), target.stride(0), width),
        BLOCK=COPY_BLOCK,
        SOURCE_INDEXED=source_rows is not None,
        TARGET_INDEXED=target_rows is not None,
    )


def copy_units(
    source: torch.Tensor,
    source_at: torch.Tensor,
    target: torch.Tensor,
    target_at: torch.Tensor,
    unit: int,
    source_scales: torch.Tensor | None,
    target_scales: torch.Tensor | None,
) -> None:
    check_device(source, source_at, target, target_at, source_scales, target_scales)
    layers, _, heads, _, dim = source.shape[1:]
    for rows in (source_at, target_at):
        assert rows.dtype == torch.int64
        assert rows.is_contiguous()
    for scales in (source_scales, target_scales):
        assert scales is None or (scales.shape == (layers, 2, heads) and scales.dtype == torch.float32)
    if source.dtype == target.dtype and source_scales is None and target_scales is None:
        source, target = raw(source), raw(target)
    elif INTERPRETED and target.dtype in EIGHT_BIT_FLOATS:
        raise RuntimeError(f"Triton's interpreter converts to {target.dtype} wrongly: convert in torch")
    saturates = target.dtype in EIGHT_BITS
    launch(
        "copy_units",
        units_kernel,
        (len(source_at), 2 * layers, -(-heads * unit * dim // COPY_BLOCK)),
        *(source, source_at, target, target_at),
        *(None if scales is None else scales.contiguous() for scales in (source_scales, target_scales)),
        largest(target.dtype) if saturates else 0.0,
        *(*source.stride(), *target.stride()),
        H=heads,
        U=unit,
        D=dim,
        BLOCK=COPY_BLOCK,
        HAS_SOURCE_SCALES=source_scales is not None,
        HAS_TARGET_SCALES=target_scales is not None,
        SATURATE=saturates,
        SOURCE_INTEGERS=source.dtype == torch.int8,
        TARGET_INTEGERS=target.dtype == torch.int8,
    )
