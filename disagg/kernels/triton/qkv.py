"""From the packed projection to attention's inputs in one Triton kernel: Q apart, K and V in their blocks."""

# ruff: noqa: N803 -- capitals are compiled in
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from disagg.kernels.triton.copies import count_beyond, saturated


# It differs from step to step: compiling anew where it is 1 or a multiple of 16 gains nothing.
@triton.jit(do_not_specialize=["num_queries"])
def qkv_kernel(
    qkv,  # [num_queries, (HQ + 2 H) * D]: query heads, key heads, value heads
    bias,  # [(HQ + 2 H) * D], with HAS_BIAS
    gains,  # float32 [3, D], with NORMED
    cos,  # float32 [num_queries, HALF], with HALF; sin likewise
    sin,
    pool,  # [num_slots, 2, H, T, D]
    slots,  # int32 [num_queries]; offsets likewise
    offsets,
    key_scales,
    value_scales,
    counter,  # int64, with COUNT: numbers beyond what the pool's dtype holds
    query,  # [num_queries, HQ, D] contiguous
    num_queries,
    epsilon,
    largest,
    qkv_stride,
    pool_stride_slot,
    pool_stride_kv,
    pool_stride_head,
    pool_stride_token,
    HQ: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,  # pairs of dimensions that are rotated
    HP: tl.constexpr,  # HALF and D - 2 HALF rounded up to powers of two
    RP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,  # bit 0: Q, 1: K, 2: V
    HAS_SCALES: tl.constexpr,
    SATURATE: tl.constexpr,
    INTEGERS: tl.constexpr,  # the pool is int8
    COUNT: tl.constexpr,
):
    """Program (BLOCK_T queries, head of Q, K or V).

    x = qkv + bias; x = x / sqrt(mean(x^2) + epsilon) * gain; for Q and K, pairs (a, b) of dimensions i and i + HALF
    become (a cos - b sin, b cos + a sin). Q goes to `query`, K and V, over their scales, to their slots. In float32
    throughout, rounded once. A head is held in three parts: the a of all pairs, the b, and what is not rotated.
    """
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_ok = row < num_queries
    row = row.to(tl.int64)
    packed = tl.program_id(1)
    kind = tl.where(packed >= HQ + H, 2, tl.where(packed >= HQ, 1, 0))
    pair = tl.arange(0, HP)
    rest = tl.arange(0, RP)
    pair_ok = row_ok[:, None] & (pair < HALF)[None, :]
    rest_ok = row_ok[:, None] & (rest < D - 2 * HALF)[None, :]
    from_ = qkv + row[:, None] * qkv_stride + packed * D
    a = tl.load(from_ + pair[None, :], mask=pair_ok, other=0.0).to(tl.float32)
    b = tl.load(from_ + HALF + pair[None, :], mask=pair_ok, other=0.0).to(tl.float32)
    c = tl.load(from_ + 2 * HALF + rest[None, :], mask=rest_ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        added = bias + packed * D
        a += tl.load(added + pair[None, :], mask=pair_ok, other=0.0).to(tl.float32)
        b += tl.load(added + HALF + pair[None, :], mask=pair_ok, other=0.0).to(tl.float32)
        c += tl.load(added + 2 * HALF + rest[None, :], mask=rest_ok, other=0.0).to(tl.float32)
    if NORMED:
        normed = (NORMED >> kind) & 1
        squares = (tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(c * c, 1)) / D
        factor = tl.where(normed == 1, 1.0 / tl.sqrt(squares + epsilon), 1.0)[:, None]
        gain = gains + kind * D  # 1 where there is no norm
        a = a * factor * tl.load(gain + pair[None, :], mask=(pair < HALF)[None, :], other=0.0)
        b = b * factor * tl.load(gain + HALF + pair[None, :], mask=(pair < HALF)[None, :], other=0.0)
        c = c * factor * tl.load(gain + 2 * HALF + rest[None, :], mask=(rest < D - 2 * HALF)[None, :], other=0.0)
    if HALF:
        angle = row[:, None] * HALF + pair[None, :]
        turned = pair_ok & (tl.full([BLOCK_T, HP], 0, tl.int32) + kind < 2)  # V keeps cos 1 and sin 0
        cosine = tl.load(cos + angle, mask=turned, other=1.0)
        sine = tl.load(sin + angle, mask=turned, other=0.0)
        turned_a = a * cosine - b * sine
        b = b * cosine + a * sine
        a = turned_a
    if kind == 0:
        to = query + (row[:, None] * HQ + packed) * D
        tl.store(to + pair[None, :], a.to(query.dtype.element_ty), mask=pair_ok)
        tl.store(to + HALF + pair[None, :], b.to(query.dtype.element_ty), mask=pair_ok)
        tl.store(to + 2 * HALF + rest[None, :], c.to(query.dtype.element_ty), mask=rest_ok)
    else:
        head = packed - HQ - (kind - 1) * H
        slot = tl.load(slots + row, mask=row_ok, other=0).to(tl.int64)
        offset = tl.load(offsets + row, mask=row_ok, other=0)
        if HAS_SCALES:
            scale = tl.where(kind == 1, tl.load(key_scales + head), tl.load(value_scales + head))
            a = a / scale
            b = b / scale
            c = c / scale
        if COUNT:
            count_beyond(tl.where(pair_ok, a, 0.0), largest, counter)
            count_beyond(tl.where(pair_ok, b, 0.0), largest, counter)
            count_beyond(tl.where(rest_ok, c, 0.0), largest, counter)
        if SATURATE:
            a = saturated(a, largest, INTEGERS)
            b = saturated(b, largest, INTEGERS)
            c = saturated(c, largest, INTEGERS)
        at = slot * pool_stride_slot + (kind - 1) * pool_stride_kv + head * pool_stride_head
        into = pool + (at + offset * pool_stride_token)[:, None]
        tl.store(into + pair[None, :], a.to(pool.dtype.element_ty), mask=pair_ok)
        tl.store(into + HALF + pair[None, :], b.to(pool.dtype.element_ty), mask=pair_ok)
        tl.store(into + 2 * HALF + rest[None, :], c.to(pool.dtype.element_ty), mask=rest_ok)
