"""Paged attention in Triton: one tile of queries against the keys it sees, and the merge of split tiles.

The syntax is what triton 3.6 to 3.9 and their interpreters share: scalar conditions enter a block through `tl.where`,
never through `block & scalar`.
"""

# ruff: noqa: N803 -- capitals are compiled in
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from disagg.kernels.triton.copies import worth


# Numbers that differ from step to step: compiling anew where one is 1 or a multiple of 16 gains nothing.
@triton.jit(do_not_specialize=["window", "num_sink_tokens", "num_splits", "table_stride"])
def attention_kernel(
    query,  # [num_queries, num_heads, D]
    pool,  # [num_slots, 2, num_kv_heads, T, D]: one layer of a coalesced slot, by strides
    table,  # int32 [num_runs, width]: the slots of a run's blocks, the sinks' first; what lies past them is not read
    runs,  # int32 [num_runs, 4]: index of the run's first query, num_queries, its position, shift
    tiles,  # int32 [num_tiles, 2]: run, first query of the tile within the run
    sink_logits,  # float32 [num_heads], with HAS_SINK_LOGITS
    key_scales,  # float32 [num_kv_heads], with HAS_SCALES; value_scales likewise
    value_scales,
    out,  # [num_queries, num_heads, D] contiguous; with SPLIT float32 [num_tiles, num_heads, num_splits, D]
    split_max,  # float32 [num_tiles, num_heads, num_splits], with SPLIT; split_sum likewise
    split_sum,
    window,
    num_sink_tokens,
    scale,
    softcap,
    num_splits,
    query_stride_token,
    query_stride_head,
    pool_stride_slot,
    pool_stride_kv,
    pool_stride_head,
    pool_stride_token,
    table_stride,
    R: tl.constexpr,  # query heads per kv head
    T: tl.constexpr,  # tokens per block
    D: tl.constexpr,
    DP: tl.constexpr,  # D rounded up to a power of two, at least 16
    BLOCK_Q: tl.constexpr,  # queries per tile
    BLOCK_M: tl.constexpr,  # rows per tile, at least BLOCK_Q * R
    BLOCK_N: tl.constexpr,  # keys per iteration
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINK_LOGITS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    INTEGERS: tl.constexpr,  # the pool is int8
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,  # multiply in float32: the interpreter's bfloat16 product is that of the bit patterns
):
    """Program (tile, kv head, split): online softmax over the split's share of the keys.

    score(q, k) = q·k * scale, then softcap * tanh(score / softcap); a query at p sees keys in (p - window, p] and those
    before `num_sink_tokens`. out = sum(exp(score) v) / (sum(exp(score)) + exp(sink_logit)).

    Rows are (query, query head of this kv head), query by query. Keys are counted as a run's table lists them: block
    table[run, i] holds keys [i * T, (i + 1) * T), and a key's position is its count, or from the window's first block
    on its count + shift. A sink token's position is always its count: either all sink blocks are listed first, or no
    block was left out and shift is 0. So a tile reads two ranges, the sink tokens and its window, in chunks of BLOCK_N
    that a split takes an equal number of. Every key that is read is seen by some query of the tile: a dead slot's
    bytes, or those behind a sequence's end, are never loaded, and may be NaN.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    run = tl.load(tiles + tile * 2)
    first_query = tl.load(tiles + tile * 2 + 1)
    flat = tl.load(runs + run * 4)
    num_queries = tl.load(runs + run * 4 + 1)
    start = tl.load(runs + run * 4 + 2)
    shift = tl.load(runs + run * 4 + 3)

    row = tl.arange(0, BLOCK_M)
    index = first_query + row // R
    row_ok = (row < BLOCK_Q * R) & (index < num_queries)
    query_head = head * R + row % R
    token = (flat + index).to(tl.int64)
    position = start + index
    d = tl.arange(0, DP)
    d_ok = d < D
    q_at = token[:, None] * query_stride_token + query_head[:, None] * query_stride_head + d[None, :]
    q_ok = row_ok[:, None] & d_ok[None, :]
    q = tl.load(query + q_at, mask=q_ok, other=0.0)
    if WIDE:
        q = q.to(tl.float32)

    low = start + first_query
    end = start + tl.minimum(first_query + BLOCK_Q, num_queries) - shift
    sink_end = tl.minimum(num_sink_tokens, end)
    begin = sink_end
    if HAS_WINDOW:
        begin = tl.maximum(low - window + 1 - shift, sink_end)
    num_sink_chunks = tl.cdiv(sink_end, BLOCK_N)
    num_chunks = num_sink_chunks + tl.cdiv(end - begin, BLOCK_N)
    share = tl.cdiv(num_chunks, num_splits)

    # Far below any score in base 2, and finite: the difference of two such is 0, not NaN.
    highest = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, DP], tl.float32)
    key_scale = 1.0
    value_scale = 1.0
    if HAS_SCALES:
        key_scale = tl.load(key_scales + head)
        value_scale = tl.load(value_scales + head)

    for chunk in range(split * share, tl.minimum((split + 1) * share, num_chunks)):
        in_sinks = chunk < num_sink_chunks
        count = tl.where(in_sinks, chunk * BLOCK_N, begin + (chunk - num_sink_chunks) * BLOCK_N) + tl.arange(0, BLOCK_N)
        key_ok = count < tl.where(in_sinks, sink_end, end)
        key_position = count + tl.where(in_sinks, 0, shift)
        slot = tl.load(table + run * table_stride + count // T, mask=key_ok, other=0).to(tl.int64)
        at = slot * pool_stride_slot + head * pool_stride_head + (count % T) * pool_stride_token
        k = tl.load(pool + at[None, :] + d[:, None], mask=d_ok[:, None] & key_ok[None, :], other=0.0)
        if INTEGERS:
            k = worth(k, True)
        k = k.to(q.dtype)
        score = tl.dot(q, k, input_precision="ieee") * (scale * key_scale)
        if HAS_SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)  # tanh(x) = 2 sigmoid(2x) - 1
        score = score * 1.4426950408889634  # log2(e): exp2 is the hardware's
        seen = (key_position[None, :] <= position[:, None]) & key_ok[None, :]
        if HAS_WINDOW:
            near = key_position[None, :] > position[:, None] - window
            sinks = key_position < num_sink_tokens
            seen = seen & (near | sinks[None, :])
        score = tl.where(seen, score, -1.0e30)
        above = tl.maximum(highest, tl.max(score, 1))
        fade = tl.exp2(highest - above)
        weight = tl.where(seen, tl.exp2(score - above[:, None]), 0.0)
        v_at = at[:, None] + pool_stride_kv + d[None, :]
        v = tl.load(pool + v_at, mask=key_ok[:, None] & d_ok[None, :], other=0.0)
        if INTEGERS:
            v = worth(v, True)
        v = v.to(q.dtype)
        total = total * fade + tl.sum(weight, 1)
        weighted = weighted * fade[:, None] + tl.dot(weight.to(q.dtype), v, input_precision="ieee")
        highest = above

    weighted = weighted * value_scale
    if SPLIT:
        part = (tile * tl.num_programs(1) * R + query_head) * num_splits + split
        tl.store(split_max + part, highest, mask=row_ok)
        tl.store(split_sum + part, total, mask=row_ok)
        tl.store(out + part.to(tl.int64)[:, None] * D + d[None, :], weighted, mask=q_ok)
    else:
        if HAS_SINK_LOGITS:
            sink = tl.load(sink_logits + query_head, mask=row_ok, other=0.0) * 1.4426950408889634
            above = tl.maximum(highest, sink)
            fade = tl.exp2(highest - above)
            total = total * fade + tl.exp2(sink - above)
            weighted = weighted * fade[:, None]
        result = weighted / tl.where(total > 0.0, total, 1.0)[:, None]
        out_at = (token[:, None] * (tl.num_programs(1) * R) + query_head[:, None]) * D + d[None, :]
        tl.store(out + out_at, result.to(out.dtype.element_ty), mask=q_ok)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    split_out,  # float32 [num_tiles, num_heads, num_splits, D]; split_max and split_sum the same without D
    split_max,
    split_sum,
    runs,
    tiles,
    sink_logits,
    out,  # [num_queries, num_heads, D] contiguous
    num_splits,
    D: tl.constexpr,
    DP: tl.constexpr,
    SP: tl.constexpr,  # num_splits rounded up to a power of two
    HAS_SINK_LOGITS: tl.constexpr,
):
    """Program (tile, query head): out = sum_s(2^(max_s - m) out_s) / (sum_s(2^(max_s - m) sum_s) + 2^(sink - m)).

    m is the largest of all maxima and the sink. Splits without keys have sum 0 and the lowest maximum: weight 0.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    part = (tile * tl.num_programs(1) + head) * num_splits
    s = tl.arange(0, SP)
    s_ok = s < num_splits
    maxima = tl.load(split_max + part + s, mask=s_ok, other=-1.0e30)
    highest = tl.max(maxima, 0)
    if HAS_SINK_LOGITS:
        sink = tl.load(sink_logits + head) * 1.4426950408889634
        highest = tl.maximum(highest, sink)
    total = tl.sum(tl.load(split_sum + part + s, mask=s_ok, other=0.0) * tl.exp2(maxima - highest), 0)
    if HAS_SINK_LOGITS:
        total += tl.exp2(sink - highest)
    d = tl.arange(0, DP)
    d_ok = d < D
    weighted = tl.zeros([DP], tl.float32)
    for split in range(num_splits):
        fade = tl.exp2(tl.load(split_max + part + split) - highest)
        weighted += fade * tl.load(split_out + (part + split).to(tl.int64) * D + d, mask=d_ok, other=0.0)
    flat = tl.load(runs + tl.load(tiles + tile * 2) * 4)
    at = (flat.to(tl.int64) * tl.num_programs(1) + head) * D + d
    tl.store(out + at, (weighted / tl.where(total > 0.0, total, 1.0)).to(out.dtype.element_ty), mask=d_ok)
