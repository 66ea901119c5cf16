"""Philox4x32-10, a counter-based generator: random numbers that are a function, not a stream.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11), section 3.3 and table 2.
Any worker that knows key and counter computes the same 128 bits, so no generator state ever crosses a transfer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Ids = npt.NDArray[np.int64]

# The multipliers and Weyl increments of the paper; the increments are the golden ratio and sqrt(3) - 1 in 32 bits.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_ROUNDS = 10
_SHIFT32 = np.uint64(32)


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Four uint32 words for each counter and key: arrays that broadcast, of a dimension or more so that sums wrap."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2  # uint64: the full 64-bit products
        c0, c2 = (p1 >> _SHIFT32).astype(np.uint32) ^ c1 ^ k0, (p0 >> _SHIFT32).astype(np.uint32) ^ c3 ^ k1
        c1, c3 = p1.astype(np.uint32), p0.astype(np.uint32)
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


def _halves(values: Ids) -> tuple[Words, Words]:
    """The low and the high 32 bits."""
    bits = values.view(np.uint64)
    return bits.astype(np.uint32), (bits >> _SHIFT32).astype(np.uint32)


def uniforms(seeds: Ids, positions: Ids, ids: Ids) -> npt.NDArray[np.float64]:
    """A number in (0, 1) for each (seed, position, id) of three int64 arrays of one length; a function of these alone.

    Key = the seed's 64 bits; counter = (id // 4, position's 64 bits, 0); word = id % 4. `(word + 0.5) / 2**32` is
    never 0 or 1.
    """
    low, high = _halves(positions)
    blocks = (ids >> 2).astype(np.uint32)
    words = np.stack(philox4x32((blocks, low, high, np.zeros_like(blocks)), _halves(seeds)))
    chosen = words[ids & 3, np.arange(len(ids))]
    return np.asarray((chosen.astype(np.float64) + 0.5) * 2.0**-32)


def gumbel(seeds: Ids, positions: Ids, ids: Ids) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise for each (seed, position, id): argmax(logits + noise) is a draw from softmax(logits)."""
    return np.negative(np.log(-np.log(uniforms(seeds, positions, ids))))


def as_int64(seed: int) -> np.int64:
    """The seed's low 64 bits: every Python integer is a seed."""
    return np.uint64(seed & 0xFFFF_FFFF_FFFF_FFFF).astype(np.int64)


def block_words(seed: int, position: int, blocks: Ids) -> npt.NDArray[np.uint32]:
    """Words of ids 4 * b to 4 * b + 3 for each b of `blocks`: uint32 `[n, 4]`, as in `uniforms`.

    `philox4x32` for one key, in place: an operation on many counters costs mostly the memory that it makes.
    """
    key = seed & 0xFFFF_FFFF, seed >> 32 & 0xFFFF_FFFF
    low, high = position & 0xFFFF_FFFF, position >> 32 & 0xFFFF_FFFF
    c0 = blocks.astype(np.uint64)
    c1, c2, c3, p0, p1 = (np.full_like(c0, value) for value in (low, high, 0, 0, 0))
    mask = np.uint64(0xFFFF_FFFF)
    for number in range(_ROUNDS):
        k0, k1 = (np.uint64((k + number * int(w)) & 0xFFFF_FFFF) for k, w in zip(key, (_W0, _W1), strict=True))
        np.multiply(c0, _M0, out=p0)
        np.multiply(c2, _M1, out=p1)
        for carry, added, other, word in ((p1, c1, k0, c0), (p0, c3, k1, c2)):
            np.right_shift(carry, _SHIFT32, out=word)
            word ^= added
            word ^= other
        np.bitwise_and(p1, mask, out=c1)
        np.bitwise_and(p0, mask, out=c3)
    return np.stack([word.astype(np.uint32) for word in (c0, c1, c2, c3)], axis=1)
