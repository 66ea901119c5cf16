"""What a model's layers hand to attention, learnt by one forward pass of one token.

The call is the truth: which window a layer passes, how many KV heads of which dimension, softcap, sink logits, and
whose K and V a layer shares (the very same tensor objects). Works on the meta device too, without weights.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's call. `producer`: the layer whose K and V it was handed, itself as a rule."""

    layer: int
    producer: int
    window: int | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float | None
    softcap: float | None
    has_sink_logits: bool


@dataclass(slots=True)
class Probe:
    """Collects calls; keeps the keys alive, so that identity of tensors means sharing."""

    calls: list[AttentionCall] = field(default_factory=list)
    keys: list[torch.Tensor] = field(default_factory=list)

    def record(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        scale: float | None,
        softcap: float | None,
        has_sink_logits: bool,
    ) -> torch.Tensor:
        """Note the call; an attention output of the right shape `[1, total, heads, value_dim]`."""
        same = [call.layer for call, known in zip(self.calls, self.keys, strict=True) if known is key]
        self.keys.append(key)
        self.calls.append(
            AttentionCall(
                layer=layer,
                producer=same[0] if same else layer,
                window=window,
                num_heads=query.shape[1],
                num_kv_heads=key.shape[1],
                head_dim=key.shape[3],
                value_dim=value.shape[3],
                scale=scale,
                softcap=softcap,
                has_sink_logits=has_sink_logits,
            )
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


CURRENT_PROBE: ContextVar[Probe | None] = ContextVar("current_probe", default=None)


@torch.no_grad()
def probe(module: torch.nn.Module, device: str) -> tuple[AttentionCall, ...]:
    """The attention calls of one forward pass, in layer order."""
    found = Probe()
    current = CURRENT_PROBE.set(found)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    try:
        module(input_ids=zero, position_ids=zero, use_cache=False, logits_to_keep=zero[0])
    finally:
        CURRENT_PROBE.reset(current)
    return tuple(found.calls)
