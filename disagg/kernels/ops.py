"""Every kernel under one name; `dispatch` says which implementation serves a device, and counts.

A layer's pool is `[num_slots, 2, num_kv_heads, block_size, head_dim]`: K and V of one layer, a strided view of memory
in which a slot holds all layers of its group. Nothing here copies it.
"""

from __future__ import annotations

from types import ModuleType
from typing import cast

import torch

from disagg.kernels import native_attention, reference
from disagg.kernels.batch import PagedBatch
from disagg.kernels.device_plan import DevicePlan
from disagg.kernels.dispatch import CALLS, backend
from disagg.kernels.qkv import HeadNorms, Rotary
from disagg.kernels.scales import KVScales
from disagg.kernels.workspace import Workspace

Plan = reference.Plan | DevicePlan
"""What `plan` makes: its backend's."""


def _served(operation: str, device: torch.device) -> ModuleType:
    module = backend(device)
    CALLS[f"{module.NAME}:{operation}"] += 1
    return module


def describe(pool: torch.Tensor, dtype: torch.dtype) -> str:
    """Which code attends with queries of `dtype` over `pool` and which stores their K and V, in words for a log."""
    if backend(pool.device).NAME == "triton":
        return "decode attention and KV writes: Triton"
    if not native_attention.is_loaded():
        return "decode attention and KV writes: torch operations; the compiled helper is not built or left out"
    attention = "the compiled helper" if native_attention.serves(pool, dtype) else "torch operations"
    writes = "the compiled helper" if pool.device.type == "cpu" and pool.dtype == dtype else "torch operations"
    return f"decode attention: {attention}; KV writes: {writes}"


def plan(batch: PagedBatch, pool: torch.Tensor, dtype: torch.dtype, workspace: Workspace) -> Plan:
    """Index and mask tensors for `batch`, good for every layer of the group that `pool` belongs to.

    `dtype` is that of the queries. Reads shape, strides and device of `pool`, not its contents. Plans that share
    `workspace` are used one at a time.
    """
    return cast(Plan, _served("plan", pool.device).plan(batch, pool, dtype, workspace))


def retarget(plan: Plan, batch: PagedBatch, pool: torch.Tensor) -> Plan:
    """`plan` for the same queries over other blocks: `batch` and `pool` differ in nothing but where blocks lie."""
    return cast(Plan, backend(pool.device).retarget(plan, batch, pool))


def write_kv(
    pool: torch.Tensor, plan: Plan, key: torch.Tensor, value: torch.Tensor, *, scales: KVScales | None = None
) -> None:
    """Store `key` and `value`, `[num_queries, num_kv_heads, head_dim]` in the batch's flat order, in their blocks.

    Divided by `scales`, converted to the pool's dtype; to eight bits with saturation.
    """
    _served("write_kv", pool.device).write_kv(pool, plan, key, value, scales)


def paged_attention(
    query: torch.Tensor,
    pool: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    scales: KVScales | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `query` `[num_queries, num_heads, head_dim]` over the batch's blocks; same shape out.

    scores = q·k * scale; with `softcap` c they become c * tanh(scores / c). `sink_logits` `[num_heads]` adds one key to
    each head's softmax that has this score and no value (gpt-oss). The queries' own K and V are written first.
    `out`, contiguous, is written and returned where it is given.
    """
    module = _served("paged_attention", pool.device)
    made = module.paged_attention(query, pool, plan, scale, softcap, sink_logits, scales, out)
    return cast(torch.Tensor, made)


def preprocess_qkv(
    qkv: torch.Tensor,
    pool: torch.Tensor,
    plan: Plan,
    *,
    num_heads: int,
    bias: torch.Tensor | None = None,
    norms: HeadNorms | None = None,
    angles: Rotary | None = None,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """Split `qkv` `[num_queries, (num_heads + 2 num_kv_heads) * head_dim]` and make it ready for attention.

    Adds `bias`, norms and rotates each head as `norms` and `angles` say, stores K and V in their blocks over `scales`,
    and returns Q `[num_queries, num_heads, head_dim]` in `qkv`'s dtype. Computes in float32 and rounds once.
    """
    width = (num_heads + 2 * pool.shape[2]) * pool.shape[4]
    assert qkv.ndim == 2 and qkv.shape[1] == width, f"qkv: {tuple(qkv.shape)}, expected [n, {width}]"  # noqa: PT018
    assert bias is None or bias.shape == (width,)
    assert norms is None or norms.gains.shape == (3, pool.shape[4])
    assert angles is None or (len(angles.cos) == len(qkv) and 2 * angles.cos.shape[1] <= pool.shape[4])
    module = _served("preprocess_qkv", pool.device)
    return cast(torch.Tensor, module.preprocess_qkv(qkv, pool, plan, num_heads, bias, norms, angles, scales))


def gather_slots(memory: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Copy `slots` (int64) of `memory` `[num_slots, slot_nbytes]` uint8 to `out` `[len(slots), slot_nbytes]`."""
    return cast(torch.Tensor, _served("gather_slots", memory.device).gather_slots(memory, slots, out))


def scatter_slots(memory: torch.Tensor, slots: torch.Tensor, staging: torch.Tensor) -> None:
    """Copy `staging` `[len(slots), slot_nbytes]` to `slots` (int64, distinct) of `memory`, both uint8."""
    _served("scatter_slots", memory.device).scatter_slots(memory, slots, staging)


def copy_units(
    source: torch.Tensor,
    source_at: torch.Tensor,
    target: torch.Tensor,
    target_at: torch.Tensor,
    unit: int,
    *,
    source_scales: torch.Tensor | None = None,
    target_scales: torch.Tensor | None = None,
) -> None:
    """Copy units of `unit` tokens, of all layers and heads, between two layouts of KV.

    `source` `[slots, layers, 2, heads, T, dim]` and `target`, which may differ in slots, block size, strides (any) and
    dtype; slices of them choose layers and heads, so this re-shards heads, changes block sizes, and gathers to or
    scatters from a staging buffer (block size `unit`). `source_at` and `target_at` int64 `[n, 2]`: the slot and first
    token of each unit; the targets are distinct. A unit lies within a block on either side.
    A number is worth stored * scale, `[layers, 2, heads]` float32; without scales and between equal dtypes every bit
    is kept. To eight bits the copy saturates, and what is not finite becomes NaN.
    """
    shape, other = source.shape, target.shape
    assert shape[1:4] == other[1:4] and shape[5] == other[5], f"{tuple(shape)} to {tuple(other)}"  # noqa: PT018
    assert source_at.shape == target_at.shape == (len(source_at), 2)
    assert 0 < unit <= min(shape[4], other[4])
    module = _served("copy_units", source.device)
    module.copy_units(source, source_at, target, target_at, unit, source_scales, target_scales)
