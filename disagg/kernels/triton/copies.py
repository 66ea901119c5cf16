"""Copies in Triton: new K and V to their blocks, whole slots, and units between unequal layouts."""

# ruff: noqa: N803 -- capitals are compiled in
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

INT8_NAN: tl.constexpr = tl.constexpr(-128)  # of disagg.kernels.scales


@triton.jit
def saturated(x, largest, INTEGERS: tl.constexpr):
    """float32 within [-largest, largest], with INTEGERS rounded to the nearest even one as torch does.

    What is not finite becomes NaN, so that a check still finds it; among integers the code that stands for it.
    """
    x = x.to(tl.float32)
    clipped = tl.minimum(tl.maximum(x, -largest), largest)
    if INTEGERS:
        clipped = (clipped + 12582912.0) - 12582912.0  # 1.5 * 2^23: no digit behind the point fits beside it
        return tl.where(tl.abs(x) < float("inf"), clipped, INT8_NAN + 0.0)
    return tl.where(tl.abs(x) < float("inf"), clipped, float("nan"))


@triton.jit
def count_beyond(x, largest, counter):
    """Add to the int64 at `counter` how many of the float32 `x` are finite and beyond [-largest, largest]."""
    size = tl.abs(x)
    number = tl.sum(((size > largest) & (size < float("inf"))).to(tl.int32))
    if number > 0:
        tl.atomic_add(counter, number.to(tl.int64), sem="relaxed")


@triton.jit
def worth(x, INTEGERS: tl.constexpr):
    """Stored numbers before their scale, as float32."""
    if INTEGERS:
        return tl.where(x == INT8_NAN, float("nan"), x.to(tl.float32))
    return x.to(tl.float32)


@triton.jit
def write_kernel(
    key,  # [num_queries, num_kv_heads, D]
    value,
    pool,  # [num_slots, 2, num_kv_heads, T, D]
    slots,  # int32 [num_queries]: where each query's K and V go
    offsets,  # int32 [num_queries]: and at which token of the block
    key_scales,
    value_scales,
    counter,  # int64, with COUNT: numbers beyond what the pool's dtype holds
    largest,  # the pool dtype's largest finite value, with SATURATE
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    pool_stride_slot,
    pool_stride_kv,
    pool_stride_head,
    pool_stride_token,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # H * D rounded up to a power of two
    HAS_SCALES: tl.constexpr,
    SATURATE: tl.constexpr,
    INTEGERS: tl.constexpr,  # the pool is int8
    COUNT: tl.constexpr,
):
    """Program (query): pool[slot, 0, h, offset] = key[query, h] / key_scale[h]; V likewise."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    offset = tl.load(offsets + token)
    element = tl.arange(0, BLOCK)
    ok = element < H * D
    head = element // D
    d = element % D
    k = tl.load(key + token * key_stride_token + head * key_stride_head + d, mask=ok, other=0.0)
    v = tl.load(value + token * value_stride_token + head * value_stride_head + d, mask=ok, other=0.0)
    if HAS_SCALES:
        k = k.to(tl.float32) / tl.load(key_scales + head, mask=ok, other=1.0)
        v = v.to(tl.float32) / tl.load(value_scales + head, mask=ok, other=1.0)
    if COUNT:
        count_beyond(k, largest, counter)
        count_beyond(v, largest, counter)
    if SATURATE:
        k = saturated(k, largest, INTEGERS)
        v = saturated(v, largest, INTEGERS)
    at = slot * pool_stride_slot + head * pool_stride_head + offset * pool_stride_token + d
    tl.store(pool + at, k.to(pool.dtype.element_ty), mask=ok)
    tl.store(pool + at + pool_stride_kv, v.to(pool.dtype.element_ty), mask=ok)


@triton.jit
def rows_kernel(
    source,  # [n, WIDTH] integers, rows `source_stride` apart
    source_rows,  # int64 [n], with SOURCE_INDEXED, else row i is the i-th
    target,
    target_rows,
    source_stride,
    target_stride,
    width,
    BLOCK: tl.constexpr,
    SOURCE_INDEXED: tl.constexpr,
    TARGET_INDEXED: tl.constexpr,
):
    """Program (i, chunk): target[target_rows[i]] = source[source_rows[i]], BLOCK elements of it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < width
    source_row = row
    target_row = row
    if SOURCE_INDEXED:
        source_row = tl.load(source_rows + row)
    if TARGET_INDEXED:
        target_row = tl.load(target_rows + row)
    values = tl.load(source + source_row * source_stride + at, mask=ok)
    tl.store(target + target_row * target_stride + at, values, mask=ok)


@triton.jit
def units_kernel(
    source,  # [slots, L, 2, H, T, D], any strides
    source_at,  # int64 [n, 2]: slot, first token of each unit
    target,  # [slots, L, 2, H, T', D], any strides, another number format
    target_at,
    source_scales,  # float32 [L, 2, H], with HAS_SOURCE_SCALES; target_scales likewise
    target_scales,
    largest,  # the target format's largest finite value, with SATURATE
    source_stride_slot,
    source_stride_layer,
    source_stride_half,
    source_stride_head,
    source_stride_token,
    source_stride_dim,
    target_stride_slot,
    target_stride_layer,
    target_stride_half,
    target_stride_head,
    target_stride_token,
    target_stride_dim,
    H: tl.constexpr,
    U: tl.constexpr,  # tokens per unit
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SOURCE_SCALES: tl.constexpr,
    HAS_TARGET_SCALES: tl.constexpr,
    SATURATE: tl.constexpr,
    SOURCE_INTEGERS: tl.constexpr,  # int8 that stands for numbers, not for bits that are copied
    TARGET_INTEGERS: tl.constexpr,
):
    """Program (unit, layer and half, chunk): value = source * source_scale; target = round(value / target_scale)."""
    unit = tl.program_id(0).to(tl.int64)
    layer = (tl.program_id(1) // 2).to(tl.int64)
    half = (tl.program_id(1) % 2).to(tl.int64)
    element = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    ok = element < H * U * D
    head = (element // (U * D)).to(tl.int64)
    token = element // D % U
    d = element % D
    source_slot = tl.load(source_at + unit * 2)
    source_token = tl.load(source_at + unit * 2 + 1) + token
    target_slot = tl.load(target_at + unit * 2)
    target_token = tl.load(target_at + unit * 2 + 1) + token
    source_base = source_slot * source_stride_slot + layer * source_stride_layer + half * source_stride_half
    from_ = source_base + head * source_stride_head + source_token * source_stride_token + d * source_stride_dim
    x = tl.load(source + from_, mask=ok)
    if SOURCE_INTEGERS:
        x = worth(x, True)
    scale = tl.program_id(1) * H + head
    if HAS_SOURCE_SCALES:
        x = x.to(tl.float32) * tl.load(source_scales + scale, mask=ok, other=1.0)
    if HAS_TARGET_SCALES:
        x = x.to(tl.float32) / tl.load(target_scales + scale, mask=ok, other=1.0)
    if SATURATE:
        x = saturated(x, largest, TARGET_INTEGERS)
    target_base = target_slot * target_stride_slot + layer * target_stride_layer + half * target_stride_half
    to = target_base + head * target_stride_head + target_token * target_stride_token + d * target_stride_dim
    tl.store(target + to, x.to(target.dtype.element_ty), mask=ok)
