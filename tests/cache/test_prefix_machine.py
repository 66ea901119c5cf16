"""Any order of admit, chunk, decode, fork, import, evict, cancel and loss of trust, beside a naive cache."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from support.prefix_machine import PrefixMachine

from disagg.cache.identity import BlockHasher


class WeakHasher(BlockHasher):
    """Three bits of name: different blocks have one all the time."""

    def _hash(self, *parts):
        return super()._hash(*parts)[:1].translate(bytes(byte % 8 for byte in range(256)))


class CollidingMachine(PrefixMachine):
    hasher_class = WeakHasher
    is_complete = False


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCollidingMachine = CollidingMachine.TestCase
TestCollidingMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_the_machines_hasher_does_collide():
    """Negative control: without comparing tokens, one name would serve two blocks."""
    hasher = WeakHasher(b"key", "model")
    names = {hasher.child(hasher.root(""), np.int64(token).tobytes()) for token in range(100)}
    assert len(names) == 8
