"""Attention as the model calls it: it reads and writes the paged cache through the step in progress."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from disagg.cache.layout import LayerSpec
from disagg.engine.model.probe import CURRENT_PROBE
from disagg.kernels import ops
from disagg.kernels.ops import Plan
from disagg.kernels.qkv import HeadNorms, Rotary
from disagg.kernels.scales import KVScales


class WindowMismatch(Exception):
    """A layer called attention with another window than its cache was laid out for: its answers would be wrong."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer's part of a step: its pool and scales (the producer's, where KV is shared) and its group's plan."""

    spec: LayerSpec
    pool: torch.Tensor
    plan: Plan
    scales: KVScales | None = None


Step = Mapping[int, LayerCall]
"""By layer index: all that attention needs during one forward pass."""

CURRENT_STEP: ContextVar[Step] = ContextVar("current_step")


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` `[1, heads, total, dim]`, out `[1, total, heads, dim]`, a flat batch.

    `out` is ours alone: memory to write the answer to.

    A layer that shares another's KV is handed the producer's K and V of this step; it ignores them, for the pool
    holds them and all earlier ones.
    """
    assert attention_mask is None
    assert query.shape[0] == 1
    layer_index = int(module.layer_idx)  # type: ignore[arg-type]
    probe = CURRENT_PROBE.get()
    if probe is not None:
        sinks = s_aux is not None
        return probe.record(layer_index, query, key, value, sliding_window, scaling, softcap, sinks), None
    call = CURRENT_STEP.get()[layer_index]
    if sliding_window != call.spec.window:
        raise WindowMismatch(
            f"layer {call.spec.index}: attention called with window {sliding_window}, laid out for {call.spec.window}"
        )
    if call.spec.owns_kv:
        ops.write_kv(call.pool, call.plan, key[0].transpose(0, 1), value[0].transpose(0, 1), scales=call.scales)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    made = ops.paged_attention(
        query[0].transpose(0, 1),
        call.pool,
        call.plan,
        scale=scale,
        softcap=softcap,
        sink_logits=s_aux,
        scales=call.scales,
        out=None if out is None else out[0],
    )
    return made[None], None


def packed_attention(
    layer: int,
    qkv: torch.Tensor,
    *,
    num_heads: int,
    bias: torch.Tensor | None,
    norms: HeadNorms | None,
    angles: Rotary,
    scale: float,
    window: int | None,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """From a packed projection `[total, width]` to attention's answer `[total, heads, dim]`, through the current step.

    See `ops.preprocess_qkv` and `ops.paged_attention`. Stores K and V. Raises WindowMismatch.
    """
    call = CURRENT_STEP.get()[layer]
    if call.spec.window != window:
        raise WindowMismatch(f"layer {layer}: attention called with window {window}, laid out for {call.spec.window}")
    query = ops.preprocess_qkv(
        qkv, call.pool, call.plan, num_heads=num_heads, bias=bias, norms=norms, angles=angles, scales=call.scales
    )
    return ops.paged_attention(
        query, call.pool, call.plan, scale=scale, softcap=softcap, sink_logits=sink_logits, scales=call.scales, out=out
    )
