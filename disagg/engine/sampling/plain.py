"""Sampling in NumPy, where no compiled helper is: row by row, the same numbers as `kernels/native_sampling.c`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from disagg.engine.philox import block_words
from disagg.engine.sampling.rows import Adjustments, Sampled, SampleRow
from disagg.transceiver.wire.messages.values import TokenLogprobs

Logits = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Keys = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int64]

EXCLUDED = 0x7F800000
"""The key of a score of -inf."""
MAGNITUDE = np.int32(0x7FFFFFFF)
LARGEST = float(np.finfo(np.float64).max)
HUGE_TEMPERATURE = 2.0**-20
"""Its inverse."""
LEAST_WEIGHED = np.int32(0x42AE0000)
"""The key of -87, where exps of float32 end."""
POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
PIECE = 1 << 14
ONE = 2.0**30
"""The weight of a score of 0."""


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """One token per row of `logits` (float32 `[len(rows), vocab_size]`)."""
    numbers = logits.cpu().numpy()
    return [_sample_row(numbers[i], row) for i, row in enumerate(rows)]


def _sample_row(logits: Logits, row: SampleRow) -> Sampled:
    if not (np.isfinite(logits.max()) and np.isfinite(logits.min())):  # both keep a NaN
        return Sampled(0, None, finite=False)
    adjusted = logits if row.adjustments is None else adjust(logits, row.adjustments)
    token_id = int(adjusted.argmax()) if row.inverse_temperature == 0 else _draw(adjusted, row)
    return Sampled(token_id, _logprobs(logits, token_id, row.num_logprobs), finite=True)


def _logprobs(logits: Logits, token_id: int, count: int) -> TokenLogprobs | None:
    if count < 0:
        return None
    largest = logits.max()
    with np.errstate(over="ignore"):
        total = float(largest) + math.log(exps(key_of(logits - largest)).sum(dtype=np.float64))
    top = _top(logits, count)
    return TokenLogprobs(float(logits[token_id]) - total, tuple((i, float(logits[i]) - total) for i in top))


def _top(logits: Logits, count: int) -> list[int]:
    """The `count` largest, of equal ones the first, largest first."""
    if count == 0:
        return []
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    ids = np.flatnonzero(logits >= least)
    ordered: list[int] = ids[np.argsort(-logits[ids], kind="stable")][:count].tolist()
    return ordered


# --- what changes even the greedy choice --------------------------------------------------------------------


def adjust(logits: Logits, given: Adjustments) -> Float64:
    """Mask, biases, repetition penalty, then those by count, in this order."""
    adjusted = logits.astype(np.float64)
    adjusted[given.masked] = -np.inf
    np.add.at(adjusted, given.bias_ids, given.biases)
    if given.seen is not None:
        seen = np.flatnonzero(np.unpackbits(given.seen.view(np.uint8), bitorder="little", count=len(logits)))
        adjusted[seen] = _repeated(adjusted[seen], given.repetition)
    adjusted[given.used] -= given.counts * given.frequency + given.presence
    return adjusted


def _repeated(values: Float64, factor: float) -> Float64:
    with np.errstate(over="ignore", under="ignore"):
        changed = np.where(values > 0, values / factor, values * factor)
    return np.where(np.isneginf(values), values, np.clip(changed, -LARGEST, LARGEST))


# --- scores -------------------------------------------------------------------------------------------------


def key_of(scores: npt.NDArray[np.float32]) -> Keys:
    return scores.view(np.int32) & MAGNITUDE


def _keys(adjusted: Logits | Float64, inverse: float) -> Keys:
    scores = adjusted.astype(np.float64)
    if adjusted.dtype == np.float64:  # the distance itself may be more than float64 holds; half of it is not
        scores *= 0.5
        inverse *= 2
    with np.errstate(over="ignore", under="ignore"):
        scores -= scores.max()
        if inverse < HUGE_TEMPERATURE:
            inverse = _kept_apart(inverse, -float(scores[np.isfinite(scores)].min()))
        scores *= inverse
        return key_of(scores.astype(np.float32))


def _kept_apart(inverse: float, distance: float) -> float:
    """The inverse of a huge temperature, raised until scores keep the logits' order. They are next to 0 then too."""
    if distance == 0 or inverse * distance >= 2.0**-40:
        return inverse
    return min(float(np.float64(2.0**-40) / distance), LARGEST)  # infinite for the least float64s


def exps(keys: Keys) -> npt.NDArray[np.float32]:
    """exp of scores, by the polynomial of `exp_of` in native_sampling.c, step by step: the same bits."""
    is_in = keys < LEAST_WEIGHED
    x = np.negative((keys * is_in).view(np.float32))
    n = x * np.float32(1.44269504)
    n += np.float32(12582912)
    whole = n - np.float32(12582912)
    x -= whole * np.float32(0.693359375)
    x += np.multiply(whole, np.float32(2.12194440e-4), out=whole)
    p = x * np.float32(POLYNOMIAL[0])
    for factor in POLYNOMIAL[1:-1]:
        p += np.float32(factor)
        p *= x
    p += np.float32(POLYNOMIAL[-1])
    p *= np.multiply(x, x, out=whole)
    p += x
    p += np.float32(1)
    bits = p.view(np.int32)
    bits += np.left_shift(n.view(np.int32), 23, out=n.view(np.int32))
    bits *= is_in
    return p


def weights_of(keys: Keys) -> npt.NDArray[np.int32]:
    """In pieces: what an operation makes stays in the processor's cache for the next."""
    weights = np.empty_like(keys)
    for first in range(0, len(keys), PIECE):
        piece = exps(keys[first : first + PIECE])
        piece *= np.float32(ONE)
        piece += np.float32(0.5)
        weights[first : first + PIECE] = piece
    return weights


# --- filters ------------------------------------------------------------------------------------------------


def _draw(adjusted: Logits | Float64, row: SampleRow) -> int:
    keys = _keys(adjusted, row.inverse_temperature)
    limit, last = _kept(keys, row)
    if limit < EXCLUDED - 1 or last < len(keys):
        ids = np.flatnonzero(keys <= limit)
        ids = ids[(keys[ids] < limit) | (ids <= last)]
        return _winner(row, keys[ids], ids)
    return _winner(row, keys, None)


def _kept(keys: Keys, row: SampleRow) -> tuple[int, int]:
    """Keys up to the first, and at it no id after the second."""
    limit = EXCLUDED - 1
    if row.least > -np.finfo(np.float32).max:
        limit = int(key_of(np.array([row.least], np.float32))[0])
    if row.top_k:
        kept = keys[keys <= limit]
        if row.top_k < len(kept):
            limit = int(np.partition(kept, row.top_k - 1)[row.top_k - 1])
    return _top_p(keys, row.top_p, limit) if row.top_p < 1 else (limit, len(keys))


def _top_p(keys: Keys, top_p: float, limit: int) -> tuple[int, int]:
    weights = weights_of(keys)
    total = int(np.where(keys <= limit, weights, np.int32(0)).sum(dtype=np.int64))
    wanted = min(max(math.ceil(top_p * float(total)), 1), total)
    few = np.sort(keys[keys <= _beginning(total - wanted, len(keys), limit)])
    sums = weights_of(few).cumsum(dtype=np.int64)
    at = int(np.searchsorted(sums, wanted))
    limit = int(few[at])
    first = int(np.searchsorted(few, few[at]))
    ties = np.flatnonzero(keys == limit)
    return limit, int(ties[at - first])


def _beginning(spare: int, size: int, limit: int) -> int:
    """A limit beyond which all ids together weigh less than `spare`, so that few are sorted."""
    each = spare / size - 1
    if each < 1:
        return limit
    least = math.log(each / ONE) - 1e-3
    return min(limit, int(key_of(np.array([least], np.float32))[0])) if least < 0 else limit


# --- drawing ------------------------------------------------------------------------------------------------


def _winner(row: SampleRow, keys: Keys, ids: Ids | None) -> int:
    """The id of the largest score + noise. `ids` of `keys`, ascending; None = all.

    Noise in float32, an upper bound of the true one, leaves a handful for which it is computed in float64.
    """
    words = _words(row, len(keys), ids)
    above = (~words).astype(np.float32)
    above *= np.float32(2.0**-32)
    np.maximum(above, np.float32(2.0**-34), out=above)  # -log(u) >= 1 - u, which is at least 2**-33
    bounds = np.log(above, out=above)
    bounds += keys.view(np.float32)
    np.negative(bounds, out=bounds)
    best = int(bounds.argmax())
    at_least = _noisy(keys[best : best + 1], words[best : best + 1])[0] - 1e-3
    few = np.flatnonzero(bounds >= np.float32(at_least))
    winner = int(few[_noisy(keys[few], words[few]).argmax()])
    return winner if ids is None else int(ids[winner])


def _noisy(keys: Keys, words: npt.NDArray[np.uint32]) -> Float64:
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    return -keys.view(np.float32).astype(np.float64) - np.log(-np.log(uniform))


def _words(row: SampleRow, size: int, ids: Ids | None) -> npt.NDArray[np.uint32]:
    if ids is None:
        return block_words(row.seed, row.position, np.arange(-(-size // 4))).reshape(-1)[:size]
    blocks = ids >> 2
    is_first = np.diff(blocks, prepend=-1) != 0
    words = block_words(row.seed, row.position, blocks[is_first]).reshape(-1)
    chosen: npt.NDArray[np.uint32] = words[(is_first.cumsum() - 1) * 4 + (ids & 3)]
    return chosen
