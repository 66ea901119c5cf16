"""Sampling where the logits lie on a CUDA device: scores in torch operations, filters and draws in one Triton kernel.

A program takes a row. It halves keys until the limit of a filter is found, each time over the whole row, which lies in
the device's second level cache, and draws in one more pass. The numbers are those of `rows`; products and sums are not
fused, so that weights have the same bits as elsewhere.
"""

# ruff: noqa: N803 -- capitals are compiled in
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from disagg.engine.sampling.drawn import Copies, Drawn
from disagg.engine.sampling.plain import EXCLUDED, HUGE_TEMPERATURE, LARGEST, key_of
from disagg.engine.sampling.rows import Adjustments, Sampled, SampleRow
from disagg.kernels.dispatch import CALLS
from disagg.kernels.upload import upload
from disagg.transceiver.wire.messages.values import TokenLogprobs

BLOCK: Final = 2048
NUM_WARPS: Final = 8
"""A program takes 8 ids a thread at once: logarithms in float64 take many registers, and none is spilled so."""


@triton.jit
def weights_of(key):
    """`weight_of` of native_sampling.c, step by step."""
    is_in = key < 0x42AE0000
    x = -tl.where(is_in, key, 0).to(tl.float32, bitcast=True)
    n = x * 1.44269504 + 12582912.0
    whole = n - 12582912.0
    r = x - whole * 0.693359375
    r = r + whole * 2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * (r * r) + r
    p = p + 1.0
    bits = p.to(tl.int32, bitcast=True) + (n.to(tl.int32, bitcast=True) << 23)
    e = tl.where(is_in, bits, 0).to(tl.float32, bitcast=True)
    return (e * 1073741824.0 + 0.5).to(tl.int32)


@triton.jit
def mass_to(keys, size, limit, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """What the ids at keys up to `limit` weigh, 1 each unless WEIGHED."""
    sum = tl.zeros([BLOCK], tl.int64)
    for first in range(0, size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        key = tl.load(keys + ids, mask=ids < size, other=0x7F800000)
        weight = weights_of(key) if WEIGHED else tl.full([BLOCK], 1, tl.int32)
        sum += tl.where(key <= limit, weight, 0).to(tl.int64)
    return tl.sum(sum)


@triton.jit
def limit_of(keys, size, wanted, high, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """The least limit whose ids weigh `wanted` or more, and what those before it weigh."""
    low = high * 0 - 1
    below = wanted * 0
    while high - low > 1:
        middle = low + (high - low) // 2
        here = mass_to(keys, size, middle, WEIGHED, BLOCK)
        is_enough = here >= wanted
        below = tl.where(is_enough, below, here)
        low = tl.where(is_enough, low, middle)
        high = tl.where(is_enough, middle, high)
    return high, below


@triton.jit
def last_tie(keys, size, limit, number, BLOCK: tl.constexpr):
    """The id of the `number`-th id at the limit, counted from 1."""
    found = number * 0
    last = number * 0 - 1
    for first in range(0, size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        is_tie = tl.load(keys + ids, mask=ids < size, other=0x7F800000) == limit
        place = tl.cumsum(is_tie.to(tl.int64), 0) + found
        last = tl.maximum(last, tl.max(tl.where(is_tie & (place == number), ids, -1)))
        found += tl.sum(is_tie.to(tl.int64))
    return last


@triton.jit
def sample_kernel(
    keys,  # int32 [rows, size]
    drawn,  # int64 [rows]
    seeds,  # int64 [rows]
    positions,  # int64 [rows]
    limits,  # int32 [rows]: the key of min-p, or of the least finite score
    top_ks,  # int64 [rows], 0: off
    top_ps,  # float64 [rows], 1: off
    size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    keys += row.to(tl.int64) * size
    limit = tl.load(limits + row)
    last = size.to(tl.int64)
    top_k = tl.load(top_ks + row)
    if top_k > 0:  # noqa: SIM102 -- compiled, `and` would compute both
        if mass_to(keys, size, limit, False, BLOCK) > top_k:
            limit, _ = limit_of(keys, size, top_k, limit, False, BLOCK)
    top_p = tl.load(top_ps + row)
    if top_p < 1:
        all = mass_to(keys, size, limit, True, BLOCK)
        wanted = tl.ceil(top_p * all.to(tl.float64)).to(tl.int64)
        wanted = tl.minimum(tl.maximum(wanted, 1), all)
        limit, below = limit_of(keys, size, wanted, limit, True, BLOCK)
        each = weights_of(limit).to(tl.int64)
        last = last_tie(keys, size, limit, (wanted - below + each - 1) // each, BLOCK).to(tl.int64)
    seed, position = tl.load(seeds + row).to(tl.uint64, bitcast=True), tl.load(positions + row)
    best, best_id = float("-inf") + top_p * 0, last * 0
    for first in range(0, size, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        key = tl.load(keys + ids, mask=ids < size, other=0x7F800000)
        block = (ids >> 2).to(tl.uint32)
        low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
        a, b, c, d = tl.philox(seed, block, low + block * 0, high + block * 0, block * 0)
        word = tl.where(ids % 4 < 2, tl.where(ids % 4 == 0, a, b), tl.where(ids % 4 == 2, c, d))
        noise = -tl.log(-tl.log((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10))
        is_kept = (key < limit) | ((key == limit) & (ids <= last))
        score = tl.where(is_kept, noise - key.to(tl.float32, bitcast=True).to(tl.float64), float("-inf"))
        most = tl.max(score)
        at = tl.min(tl.where(score == most, ids, size)).to(tl.int64)
        best_id = tl.where(most > best, at, best_id)
        best = tl.maximum(best, most)
    tl.store(drawn + row, best_id)


# --- the host's part ------------------------------------------------------------------------------------------


def sample(logits: torch.Tensor, rows: Sequence[SampleRow], block: int = BLOCK) -> list[Sampled]:
    """One token per row of `logits` (float32 `[len(rows), vocab_size]`, on the device)."""
    return list(draw(logits, rows, block).read())


def draw(logits: torch.Tensor, rows: Sequence[SampleRow], block: int = BLOCK) -> Drawn:
    """`sample`, queued and not waited for."""
    CALLS["triton:sample_rows"] += 1
    finite = logits.isfinite().all(-1)
    adjusted = _adjusted(logits.nan_to_num().double(), rows)
    token_ids = adjusted.argmax(-1)
    drawing = [i for i, row in enumerate(rows) if row.inverse_temperature > 0]
    if drawing:
        at = upload(np.array(drawing, np.int64), logits.device)
        token_ids[at] = _draw(adjusted[at], [rows[i] for i in drawing], block)
    asking = [i for i, row in enumerate(rows) if row.num_logprobs >= 0]
    told = [_logprobs(logits[i], token_ids[i], rows[i].num_logprobs) for i in asking]
    copies = Copies([token_ids, finite, *chain.from_iterable(told)])
    return Drawn(token_ids, lambda: _sampled(copies.read(), asking))


def _adjusted(values: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    for i, row in enumerate(rows):
        if row.adjustments is not None:
            _adjust(values[i], row.adjustments)
    return values


def _adjust(values: torch.Tensor, given: Adjustments) -> None:
    """In place, as `plain.adjust`."""

    def there(array: Any) -> torch.Tensor:
        return upload(array, values.device)

    values[there(given.masked)] = -torch.inf
    values.index_put_((there(given.bias_ids),), there(given.biases), accumulate=True)
    if given.seen is not None:
        seen = there(np.unpackbits(given.seen.view(np.uint8), bitorder="little", count=len(values)).view(np.bool_))
        changed = torch.where(values > 0, values / given.repetition, values * given.repetition).clamp(-LARGEST, LARGEST)
        torch.where(seen & (values > -torch.inf), changed, values, out=values)
    values[there(given.used)] -= there(given.counts * given.frequency + given.presence)


def _keys(adjusted: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """Half of a distance is never more than float64 holds; twice the inverse makes it whole."""
    inverse = upload(np.array([2 * row.inverse_temperature for row in rows], np.float64), adjusted.device)
    scores = adjusted * 0.5
    scores -= scores.amax(-1, keepdim=True)
    distance = torch.where(scores > -torch.inf, -scores, 0).amax(-1)
    is_vanishing = (inverse < 2 * HUGE_TEMPERATURE) & (inverse * distance < 2.0**-40) & (distance > 0)
    inverse = torch.where(is_vanishing, (2.0**-40 / distance).clamp(max=LARGEST), inverse)
    scores *= inverse[:, None]
    return scores.float().view(torch.int32) & 0x7FFFFFFF


def _draw(adjusted: torch.Tensor, rows: Sequence[SampleRow], block: int) -> torch.Tensor:
    device = adjusted.device
    least = np.array([row.least for row in rows])
    limits = np.where(least > -np.inf, key_of(least.astype(np.float32)), EXCLUDED - 1).astype(np.int32)
    seeds = np.array([row.seed for row in rows], np.uint64).view(np.int64)
    positions, top_ks = (np.array([getattr(row, name) for row in rows], np.int64) for name in ("position", "top_k"))
    arrays = (seeds, positions, limits, top_ks, np.array([row.top_p for row in rows], np.float64))
    drawn = torch.empty(len(rows), dtype=torch.int64, device=device)
    given = [upload(array, device) for array in arrays]
    CALLS["kernel:sample"] += 1
    keys = _keys(adjusted, rows).contiguous()
    sample_kernel[(len(rows),)](
        keys, drawn, *given, keys.shape[1], BLOCK=block, num_warps=NUM_WARPS, enable_fp_fusion=False
    )
    return drawn


def _logprobs(logits: torch.Tensor, token_id: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    """Float64 `[1]`, the token's; int64 and float64 `[count]`, ids and values of the largest."""
    logprobs = logits.double().log_softmax(-1)
    values, ids = logprobs.topk(count)
    return logprobs.gather(0, token_id.view(1)), ids, values


def _sampled(copies: Sequence[torch.Tensor], asking: Sequence[int]) -> list[Sampled]:
    """`copies`: token ids, whether rows are finite, and three tensors of each row that asks for log-probabilities."""
    token_ids, finite, *told = (copy.tolist() for copy in copies)
    logprobs = {i: _told(*told[3 * at : 3 * at + 3]) for at, i in enumerate(asking)}
    return [
        Sampled(token_id, logprobs.get(i), finite=True) if is_finite else Sampled(0, None, finite=False)
        for i, (token_id, is_finite) in enumerate(zip(token_ids, finite, strict=True))
    ]


def _told(own: list[float], ids: list[int], values: list[float]) -> TokenLogprobs:
    top = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprobs(own[0], tuple(top))
