"""Blocks that later sequences may use: registered as they are computed or verified, found by their tokens.

A sequence walks the prefix tree as its blocks are registered (`Chain`). Registration is of whole blocks only, and a
registered block is never written again. Whoever loses trust in a block takes everything that extends it out as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from disagg.cache.identity import BlockHasher, token_bytes
from disagg.cache.layout import CacheLayout
from disagg.cache.pool import SlotPool
from disagg.cache.prefix import NO_SLOT, Node, PrefixTree
from disagg.cache.reuse import Resident


@dataclass(slots=True, eq=False)
class Chain:
    """Where a sequence stands in the tree: `path[o]` is the node of its ordinal o. The last one is pinned."""

    salt: str
    path: list[Node] = field(default_factory=list)
    is_stopped: bool = False
    """Nothing of this sequence is registered any more: a name was taken, or a block before it lost trust."""
    precision: str = ""
    """The formats that its KV has been through before it came here; "" = this cache's own."""


@dataclass(slots=True)
class ReuseCount:
    """Blocks of one layer group that requests asked the cache for, and those that it had."""

    num_queried: int = 0
    num_hit: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix. `slots[g]`: int32 [n], where group g has each of its n blocks, or -1."""

    path: list[Node]
    slots: tuple[NDArray[np.int32], ...]

    @property
    def resident(self) -> tuple[Resident, ...]:
        return tuple(slots != NO_SLOT for slots in self.slots)


class PrefixCache:
    """The tree, and which slot of which pool belongs to which node."""

    def __init__(self, layout: CacheLayout, pools: Sequence[SlotPool], hasher: BlockHasher) -> None:
        self._layout, self._pools = layout, pools
        self.tree = PrefixTree(hasher, layout.block_size, layout.num_groups)
        self._owner: list[dict[int, tuple[Node, int]]] = [{} for _ in pools]
        for number, pool in enumerate(pools):
            pool.on_evict = lambda slot, number=number: self._forget(number, slot)  # type: ignore[misc]
        self.counts = tuple(ReuseCount() for _ in layout.groups)

    def match(self, chain: Chain, tokens: Sequence[int]) -> Match:
        """What a sequence may use of the whole blocks of `tokens`. Changes nothing, references nothing."""
        path = self.tree.match(chain.salt, tokens, chain.precision)
        slots = np.array([node.slots for node in path], dtype=np.int32).reshape(len(path), self._layout.num_groups)
        return Match(path, tuple(np.ascontiguousarray(column) for column in slots.T))

    def follow(self, chain: Chain, path: list[Node]) -> None:
        """A sequence that stands nowhere yet takes this path."""
        assert not chain.path
        chain.path = path
        if path:
            self.tree.pin(path[-1])

    def leave(self, chain: Chain) -> None:
        if chain.path:
            self.tree.unpin(chain.path[-1])
        chain.path = []

    def register(self, chain: Chain, ordinal: int, block: bytes, slots: Sequence[int]) -> bool:
        """Offer the block after those registered before; `slots[g]` or -1. False, and no more, if it cannot be trusted.

        A block that another sequence registered first keeps its slot; this one's stays its own.
        """
        node = self._step(chain, ordinal, block)
        pools = [self._pools[pool] for pool in self._layout.pool_of_group]
        if node is None or any(slot >= 0 and pool.is_tainted(slot) for slot, pool in zip(slots, pools, strict=True)):
            chain.is_stopped = True
            return False
        for group, (slot, pool) in enumerate(zip(slots, pools, strict=True)):
            if slot >= 0 and node.slots[group] == NO_SLOT:
                pool.register(slot)
                node.slots[group] = slot
                self._owner[self._layout.pool_of_group[group]][slot] = (node, group)
        return True

    def node_at(self, pool: int, slot: int) -> Node | None:
        """The block that is registered in this slot."""
        owner = self._owner[pool].get(slot)
        return owner[0] if owner is not None else None

    def unregister(self, top: Node) -> int:
        """Take a block and all that extends it out of reach, in every group. Returns how many slots that were."""
        slots: list[list[int]] = [[] for _ in self._pools]
        for node in self.tree.cut(top):
            for group, slot in enumerate(node.slots):
                if slot != NO_SLOT:
                    number = self._layout.pool_of_group[group]
                    del self._owner[number][slot]
                    slots[number].append(slot)
        for pool, taken in zip(self._pools, slots, strict=True):
            pool.unregister(taken)
        return sum(map(len, slots))

    def count(self, group: int, num_queried: int, num_hit: int) -> None:
        self.counts[group].num_queried += num_queried
        self.counts[group].num_hit += num_hit

    def check_invariants(self) -> None:
        """Nodes and pools agree on every registered slot."""
        self.tree.check_invariants()
        owned = 0
        for node in self.tree:
            for group, slot in enumerate(node.slots):
                if slot != NO_SLOT:
                    owned += 1
                    number = self._layout.pool_of_group[group]
                    assert self._owner[number].get(slot) == (node, group), "a slot serves two blocks"
                    assert self._pools[number].is_registered(slot), "a known slot is not registered"
        registered = sum(pool.num_registered for pool in self._pools)
        assert owned == sum(map(len, self._owner)) == registered, "a registered slot is nobody's"

    def _step(self, chain: Chain, ordinal: int, block: bytes) -> Node | None:
        """The living node of this ordinal, which the chain then stands on at least."""
        if chain.path and chain.path[-1].is_dead:  # the death of any node of a path is that of its last
            return None
        if ordinal < len(chain.path):
            return chain.path[ordinal]
        assert ordinal == len(chain.path)
        before = chain.path[-1] if chain.path else self.tree.root(chain.salt, chain.precision)
        node = None if before is None else self.tree.child(before, block)
        if node is not None:
            self.tree.pin(node)
            chain.path.append(node)
        if len(chain.path) > 1 and node is not None:
            self.tree.unpin(chain.path[-2])
        elif node is None and not chain.path:
            self.tree.prune(before)
        return node

    def _forget(self, number: int, slot: int) -> None:
        """A pool evicts this slot."""
        node, group = self._owner[number].pop(slot)
        node.slots[group] = NO_SLOT
        self.tree.prune(node)


def blocks_of(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """`token_bytes` of each whole block."""
    data, step = token_bytes(tokens), 8 * block_size
    return [data[start : start + step] for start in range(0, len(data) - step + 1, step)]
