"""Philox4x32-10, a counter-based generator: random numbers that are a function, not a stream.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC11), section 3.3 and table 2.
Any worker that knows key and counter computes the same 128 bits, so no generator state ever crosses a transfer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]

# The multipliers and Weyl increments of the paper; the increments are the golden ratio and sqrt(3) - 1 in 32 bits.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_MASK32 = 0xFFFFFFFF
_SHIFT32 = np.uint64(32)


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four uint32 words for each counter (four arrays that broadcast) under `key` (two 32-bit numbers)."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint32) for word in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = _M0 * c0, _M1 * c2  # uint64: the full 64-bit products
        high0, high1 = (p0 >> _SHIFT32).astype(np.uint32), (p1 >> _SHIFT32).astype(np.uint32)
        c0, c1, c2, c3 = (
            high1 ^ c1 ^ np.uint32(k0),
            p1.astype(np.uint32),
            high0 ^ c3 ^ np.uint32(k1),
            p0.astype(np.uint32),
        )
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return c0, c1, c2, c3


def uniforms(seed: int, position: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in (0, 1) for each of `ids`, a function of (seed, position, id) alone.

    Key = the seed's 64 bits; counter = (id // 4, position's 64 bits, 0); word = id % 4. `(word + 0.5) / 2**32` is
    never 0 or 1.
    """
    blocks = (ids >> 2).astype(np.uint32)
    shape = np.zeros_like(blocks)
    low, high = shape + np.uint32(position & _MASK32), shape + np.uint32(position >> 32 & _MASK32)
    words = np.stack(philox4x32((blocks, low, high, shape), (seed & _MASK32, seed >> 32 & _MASK32)))
    chosen = words[ids & 3, np.arange(len(ids))]
    return np.asarray((chosen.astype(np.float64) + 0.5) * 2.0**-32)


def gumbel(seed: int, position: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise per id: argmax(logits + noise) is a draw from softmax(logits)."""
    return np.negative(np.log(-np.log(uniforms(seed, position, ids))))
