"""Attention as one opaque operation, so that a traced model can be cut where it is called.

All that it writes is declared in its schema: the layer's pool, and `out`, which its caller allocates. What it
reads of the step in progress (lengths, block tables, plans) is no part of what is traced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch

from disagg.engine.model.attention import packed_attention, paged_attention
from disagg.kernels.qkv import HeadNorms, Rotary

NUM_TOKENS: ContextVar[int] = ContextVar("num_tokens")
"""How many tokens of the bucket are real in the step in progress; 0 while pieces are captured."""
TRACED_ATTENTION_NAME = "disagg_traced"
COMPILED_ATTENTION_NAME = "disagg_compiled"
"""What transformers calls `traced_attention` and `compiled_attention`."""


@contextmanager
def tokens(count: int) -> Iterator[None]:
    """Inside, `count` tokens are real."""
    current = NUM_TOKENS.set(count)
    try:
        yield
    finally:
        NUM_TOKENS.reset(current)


@contextmanager
def calling(name: str, model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` calls the attention of this name; outside of it eager steps call the plain one."""
    config: Any = model.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.library.custom_op("disagg::attend", mutates_args=("pool", "out"))
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    pool: torch.Tensor,
    out: torch.Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """`paged_attention` of the real tokens of `[1, heads, bucket, dim]` into `out` `[1, bucket, heads, dim]`.

    `pool` is the memory that the step's own view of this layer writes. `window` and `softcap`: 0 for none. Where the
    bucket is padded `out` becomes zero: it goes on through the model, and must stay finite.
    """
    count = NUM_TOKENS.get()
    out[:, count:] = 0
    if count:
        paged_attention(
            SimpleNamespace(layer_idx=layer),  # type: ignore[arg-type]  # all it asks of a module
            query[:, :, :count],
            key[:, :, :count],
            value[:, :, :count],
            None,
            scaling=scale,
            sliding_window=window or None,
            softcap=softcap or None,
            s_aux=sinks,
            out=out[:, :count],
        )


@attend.register_fake
def _(*_: Any) -> None:
    """It returns nothing, so tracing has no shape to learn."""


@torch.library.custom_op("disagg::attend_packed", mutates_args=("pool", "out"))
def attend_packed(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor | None,
    gains: torch.Tensor | None,
    sinks: torch.Tensor | None,
    pool: torch.Tensor,
    out: torch.Tensor,
    layer: int,
    normed: int,
    epsilon: float,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """`packed_attention` of the real tokens of `qkv` `[bucket, width]` into `out` `[bucket, heads, dim]`.

    `cos` and `sin` as `Rotary` has them, `gains` as `HeadNorms`; of `normed` bit i stands for Q, K and V. `pool`,
    `window`, `softcap` and padding as in `attend`.
    """
    count = NUM_TOKENS.get()
    out[count:] = 0
    if count:
        kinds = (bool(normed & 1), bool(normed & 2), bool(normed & 4))
        packed_attention(
            layer,
            qkv[:count],
            num_heads=out.shape[1],
            bias=bias,
            norms=None if gains is None else HeadNorms(gains, kinds, epsilon),
            angles=Rotary(cos[:count], sin[:count]),
            scale=scale,
            window=window or None,
            softcap=softcap or None,
            sink_logits=sinks,
            out=out[:count],
        )


@attend_packed.register_fake
def _(*_: Any) -> None:
    """As `attend`."""


def traced_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface while a model is traced: `out` is allocated in the piece before the call."""
    num_heads, bucket = query.shape[1:3]
    out = query.new_empty(1, bucket, num_heads, value.shape[3])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    pool, layer = module.kv_pool, module.layer_idx
    attend(query, key, value, s_aux, pool, out, layer, scale, sliding_window or 0, softcap or 0.0)
    return out, None


@torch.library.custom_op("disagg::attend_now", mutates_args=())
def attend_now(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """As `attend`, for a compiler: what it makes is new, and the pool is no argument.

    All layers' pools are one memory, of which a compiler that is shown them makes copies. It need not know: what one
    layer stores no other operation reads but attention, and each of these waits for the one before it through the
    model's hidden state.
    """
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    torch.ops.disagg.attend(query, key, value, sinks, out.new_empty(0), out, layer, scale, window, softcap)
    return out


@attend_now.register_fake
def _(query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def compiled_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface in a model that is compiled."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return attend_now(query, key, value, s_aux, layer, scale, sliding_window or 0, softcap or 0.0), None
