"""Decoder layers whose decode steps are one call of the compiled helper, in place of transformers' forward.

A layer is replaced when its parts are (`cpu_layers`), no others stand beside them, and the call makes the numbers of
its own forward. Steps with prompt tokens take its own forward, over the same parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import numpy as np
import torch
from torch import nn

from disagg.cache.layout import LayerSpec
from disagg.engine.model.attention import CURRENT_STEP, LayerCall
from disagg.engine.model.fused_qkv import TOLERANCE, FusedAttention, share
from disagg.engine.model.gated_layer import GatedLayer
from disagg.engine.model.native_norm import NativeNorm, random_rows
from disagg.engine.model.packed_linear import NativeLinear
from disagg.engine.model.probe import CURRENT_PROBE
from disagg.kernels import native_attention, ops, reference
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.native_decoder import Decoder, LayerNorm, LayerParts, decode_layer
from disagg.kernels.qkv import Rotary
from disagg.kernels.workspace import Workspace

AROUND: Final = {
    frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}): (
        *("input_layernorm", None, "post_attention_layernorm", None),
    ),
    frozenset(
        {
            *("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"),
            *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        }
    ): (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
"""The parts of a layer -> its norms before and after attention, before and after the gated layer."""
CHECKED_START: Final = 2  # of each checked query: two positions before its own are attended to
BLOCK_SIZE: Final = 4


class NativeDecoder:
    """The forward of one decoder layer."""

    def __init__(self, module: nn.Module, attention: FusedAttention, parts: LayerParts) -> None:
        self._module, self._attention, self._parts = module, attention, parts
        self._over: tuple[torch.Tensor, Decoder] | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, position_embeddings: Any = None, **options: Any) -> Any:
        """As transformers calls it: `hidden_states` `[1, num_queries, hidden]`, the same shape out."""
        call = self.call_of(hidden_states.shape[1])
        if call is None or hidden_states.dtype != torch.float32:
            own: Any = type(self._module).forward
            return own(self._module, hidden_states, *args, position_embeddings=position_embeddings, **options)
        angles = self._attention.angles.of(position_embeddings, self.half)
        return self.decode(hidden_states[0].contiguous(), angles, call)[None]

    @property
    def half(self) -> int:
        """Pairs of dimensions that are rotated."""
        return self._parts.half

    def decode(self, rows: torch.Tensor, angles: Rotary, call: LayerCall) -> torch.Tensor:
        """`rows` float32 `[n, hidden]`, contiguous, through the layer; `call` as `call_of` gives it."""
        plan = cast(reference.Plan, call.plan)
        assert plan.decodes is not None
        return decode_layer(self._decoder(call.pool), rows, angles, plan.writes.elements, plan.decodes)

    def call_of(self, num_queries: int) -> LayerCall | None:
        """This layer's part of the step in progress, where it is of decode rows alone and of what is served here."""
        if torch.compiler.is_compiling() or CURRENT_PROBE.get() is not None:
            return None
        call = CURRENT_STEP.get()[self._attention.call.layer]
        plan, pool = call.plan, call.pool
        is_served = (
            isinstance(plan, reference.Plan)
            and plan.decodes is not None
            and not plan.runs
            and len(plan.decodes.rows) == num_queries
            and call.scales is None
            and call.spec.window == self._attention.call.window
            and pool.dtype == torch.float32
            and native_attention.serves(pool, torch.float32)
        )
        return call if is_served else None

    def _decoder(self, pool: torch.Tensor) -> Decoder:
        if self._over is None or self._over[0] is not pool:
            self._over = pool, self._parts.over(pool)
        return self._over[1]


@torch.inference_mode()
def suit_decoder(module: nn.Module) -> bool:
    """Replace the forward of `module` if it is a decoder layer whose decode steps can be one call."""
    parts = dict(module.named_children())
    around = AROUND.get(frozenset(parts))
    attention = None if around is None else owner(parts["self_attn"], FusedAttention)
    made = None if attention is None or around is None else _parts(parts, attention, around)
    if attention is None or made is None:
        return False
    decoder = NativeDecoder(module, attention, made)
    if not _is_equal(decoder, module, attention):
        return False
    cast(Any, module).forward = decoder.forward
    return True


def owner(module: nn.Module, kind: type[Any]) -> Any:
    """What `module`'s forward was replaced by, if that is of `kind`."""
    found = getattr(vars(module).get("forward"), "__self__", None)
    return found if isinstance(found, kind) else None


def _parts(parts: dict[str, nn.Module], attention: FusedAttention, around: tuple[str | None, ...]) -> LayerParts | None:
    gated = owner(parts["mlp"], GatedLayer)
    norms = [None if name is None else owner(parts[name], NativeNorm) for name in around]
    if gated is None or any(norm is None and name for norm, name in zip(norms, around, strict=True)):
        return None
    linears = (attention.packed, parts["self_attn"].o_proj, parts["mlp"].both, parts["mlp"].down_proj)
    weights = [one.packed for one in linears if isinstance(one, NativeLinear)]
    if len(weights) < len(linears):
        return None
    before, after, before_gated, after_gated = (norm and LayerNorm(norm.gain, norm.epsilon) for norm in norms)
    assert before is not None
    assert before_gated is not None
    qkv, output, gate_up, down = weights
    return LayerParts(
        before_attention=before,
        after_attention=after,
        before_gated=before_gated,
        after_gated=after_gated,
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
        activation=gated.kind,
        num_heads=attention.call.num_heads,
        half=attention.half,
        scale=attention.scale,
        softcap=attention.call.softcap,
        bias=_wide(attention.bias),
        norms=attention.norms,
        sinks=_wide(attention.sinks),
    )


def _wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


def _is_equal(decoder: NativeDecoder, module: nn.Module, attention: FusedAttention) -> bool:
    """Whether both forwards make the same of a few random rows, each the third token of a sequence of its own."""
    x = random_rows(decoder._parts.qkv.depth)
    angle = torch.rand(1, x.shape[1], attention.half, generator=torch.Generator().manual_seed(0))
    with checked_step([decoder], x.shape[1]):
        own = module(x, position_embeddings=(angle.cos(), angle.sin()))
        made = decoder.forward(x, position_embeddings=(angle.cos(), angle.sin()))
    return isinstance(own, torch.Tensor) and share(made, own) <= TOLERANCE[torch.float32]


@contextmanager
def checked_step(decoders: Sequence[NativeDecoder], count: int) -> Iterator[None]:
    """Inside, a step of `count` decode rows is in progress, each at `CHECKED_START` of a sequence of random KV."""
    calls, draw = {}, torch.Generator().manual_seed(0)
    runs = tuple(QueryRun(np.array([slot], np.int32), CHECKED_START, 1) for slot in range(2, count + 2))
    for call in (decoder._attention.call for decoder in decoders):
        spec = LayerSpec(call.layer, call.window, 0, call.num_kv_heads, call.head_dim, "float32", call.layer)
        pool = torch.randn(count + 2, 2, call.num_kv_heads, BLOCK_SIZE, call.head_dim, generator=draw)
        plan = ops.plan(PagedBatch(runs, BLOCK_SIZE, call.window, 0), pool, torch.float32, Workspace())
        calls[call.layer] = LayerCall(spec, pool, plan)
    step = CURRENT_STEP.set(calls)
    try:
        yield
    finally:
        CURRENT_STEP.reset(step)
