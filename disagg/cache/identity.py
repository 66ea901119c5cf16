"""What a block of tokens is called: a keyed hash of everything that its KV depends on.

    identity(root)  = H(model fingerprint, precision history, salt)
    identity(block) = H(identity of the block before it, its tokens)        H = blake2b-128, keyed by the cluster

So equal names mean equal prefixes, of one model and one tenant. The key keeps clients from guessing names, and so from
probing for other tenants' prompts. Names are short, hence every use of one compares the tokens too (`prefix.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Final

import numpy as np

IDENTITY_NBYTES: Final = 16
EXACT: Final = b"exact"
"""The precision history of blocks that were never stored in another format than this cache's."""


class BlockHasher:
    """Names blocks. `key`: 1 to 64 bytes, the cluster's prefix-hash key; `model_fingerprint`: as workers compare it."""

    def __init__(self, key: bytes, model_fingerprint: str) -> None:
        self._keyed = blake2b(key=key, digest_size=IDENTITY_NBYTES, person=b"disagg-block")
        self._model = model_fingerprint.encode()

    def root(self, salt: str, precision: str = "") -> bytes:
        """The name before a sequence's first block. `precision`: see `root_bytes`."""
        return self._hash(_framed(self._model), root_bytes(salt, precision))

    def child(self, parent: bytes, tokens: bytes) -> bytes:
        """The name of the block with `tokens` (`token_bytes`) after the block called `parent`."""
        return self._hash(parent, tokens)

    def _hash(self, *parts: bytes) -> bytes:
        state = self._keyed.copy()
        for part in parts:
            state.update(part)
        return state.digest()

    def chain(self, tokens: Sequence[int], block_size: int, salt: str = "") -> tuple[bytes, ...]:
        """The names of the whole blocks of `tokens`, exact ones, first to last. A microsecond or two each."""
        return tuple(self.names(salt, blocks_of(tokens, block_size)))

    def names(self, salt: str, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """The names of blocks with these `token_bytes`, exact ones, each made when it is asked for."""
        name = self.root(salt)
        for block in blocks:
            name = self.child(name, block)
            yield name


PIECE: Final = 1024
"""Tokens whose bytes are made at once: a search for a prefix stops at the first block that is not known."""


def blocks_of(tokens: Sequence[int], block_size: int) -> Iterator[bytes]:
    """`token_bytes` of each whole block."""
    step, piece = 8 * block_size, max(1, PIECE // block_size) * block_size
    for first in range(0, len(tokens), piece):
        data = token_bytes(tokens[first : first + piece])
        yield from (data[start : start + step] for start in range(0, len(data) - step + 1, step))


def root_bytes(salt: str, precision: str) -> bytes:
    """What a root holds in place of tokens: within which KV is shared. `precision` "" = this cache's own format.

    Parts carry their length, so that none can pose as another.
    """
    return _framed(b"landed:" + precision.encode() if precision else EXACT) + _framed(salt.encode())


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int64: 8 bytes each, so that no two lists have the same bytes."""
    return np.asarray(tokens, dtype="<i8").tobytes()
