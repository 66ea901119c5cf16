"""What Triton's decode kernels do with a plan, in torch operations: a thousand times the interpreter's speed.

Shapes depend on nothing but the plan's, so a fake graph can record it. It reads the plan's tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from disagg.kernels import reference
from disagg.kernels.device_plan import DevicePlan
from disagg.kernels.dispatch import forced
from disagg.kernels.scales import KVScales, quantise, raw
from disagg.kernels.triton import backend as triton_backend


def write_kv(
    pool: torch.Tensor, plan: DevicePlan, key: torch.Tensor, value: torch.Tensor, scales: KVScales | None
) -> None:
    for which, x in enumerate((key, value)):
        scale = None if scales is None else (scales.key, scales.value)[which][:, None]
        stored = raw(quantise(x, pool.dtype, scale))  # torch does not index eight-bit floats
        raw(pool)[plan.write_slots.long(), which, :, plan.write_offsets.long()] = stored


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
    assert out is None
    assert not plan.has_prefill
    num_rows, _, dim = query.shape
    read = raw(pool)[plan.table.long()].view(pool.dtype).to(query.dtype)
    key, value = read.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [rows, kv heads, keys, dim]
    if scales is not None:
        key, value = key * scales.key[:, None, None], value * scales.value[:, None, None]
    count = torch.arange(key.shape[2])
    sink_end = -(-plan.num_sink_tokens // plan.block_size) * plan.block_size
    position = torch.where(count < sink_end, count, count + plan.runs[:, 3:])
    at = plan.runs[:, 2:3]
    seen = position <= at
    if plan.window is not None:
        seen &= (position > at - plan.window) | (position < plan.num_sink_tokens)
    seen = seen[:, None, None]
    scores = query.view(num_rows, key.shape[1], -1, dim) @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = torch.where(seen, scores, float("-inf"))
    if sink_logits is not None:
        sinks = sink_logits.float().view(1, key.shape[1], -1, 1).expand(num_rows, -1, -1, -1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ torch.where(seen.transpose(-1, -2), value, 0.0)).view(query.shape)


@contextmanager
def plan_attention() -> Iterator[None]:
    """Inside, Triton's backend serves, with these functions for its kernels."""
    with pytest.MonkeyPatch.context() as patch, forced("triton"):
        patch.setattr(triton_backend, "write_kv", write_kv)
        patch.setattr(reference, "write_kv", write_kv)
        patch.setattr(triton_backend, "preprocess_qkv", reference.preprocess_qkv)
        patch.setattr(triton_backend, "paged_attention", paged_attention)
        yield
