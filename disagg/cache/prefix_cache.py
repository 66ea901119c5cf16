"""Blocks that later sequences may use: registered as they are computed or verified, found by their tokens.

A sequence walks the prefix tree as its blocks are registered (`Chain`). Registration is of whole blocks only, and a
registered block is never written again. A block that is withdrawn takes everything that extends it along.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain as chained

import numpy as np
from numpy.typing import NDArray

from disagg.cache.identity import BlockHasher, blocks_of
from disagg.cache.journal import BlockJournal
from disagg.cache.layout import CacheLayout
from disagg.cache.loans import Loans
from disagg.cache.pool import SlotPool
from disagg.cache.prefix import NO_SLOT, PrefixNode, PrefixTree
from disagg.cache.reuse import Resident
from disagg.cache.table import Table


@dataclass(slots=True, eq=False)
class Chain:
    """Where a sequence stands in the tree: `path[o]` is the node of its ordinal o. The last one is pinned."""

    salt: str
    path: list[PrefixNode] = field(default_factory=list)
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

    path: list[PrefixNode]
    slots: tuple[NDArray[np.int32], ...]

    @property
    def resident(self) -> tuple[Resident, ...]:
        return tuple(slots != NO_SLOT for slots in self.slots)


class PrefixCache:
    """The tree, and which slot of which pool belongs to which node."""

    def __init__(self, layout: CacheLayout, pools: Sequence[SlotPool], hasher: BlockHasher) -> None:
        self._layout, self._pools = layout, pools
        self.hasher = hasher
        self.tree = PrefixTree(hasher, layout.num_groups)
        self._owner: list[dict[int, tuple[PrefixNode, int]]] = [{} for _ in pools]
        for number, pool in enumerate(pools):
            pool.on_evict = lambda slots, number=number: self._forget(number, slots)  # type: ignore[misc]
        self.counts = tuple(ReuseCount() for _ in layout.groups)
        self.journal = BlockJournal(self.tree)
        self.loans = Loans()

    def look_up(self, tokens: Sequence[int], salt: str) -> Match:
        """`match` for no sequence: exact blocks of these tokens."""
        return self.match(Chain(salt), tokens)

    def match(self, chain: Chain, tokens: Sequence[int]) -> Match:
        """What a sequence may use of the whole blocks of `tokens`. Changes nothing, references nothing."""
        path = self.tree.match(chain.salt, blocks_of(tokens, self._layout.block_size), chain.precision)
        flat = np.fromiter(chained.from_iterable(node.slots for node in path), dtype=np.int32)
        slots = flat.reshape(len(path), self._layout.num_groups)
        return Match(path, tuple(np.ascontiguousarray(column) for column in slots.T))

    def lend(self, key: Hashable, slots: Sequence[Sequence[int]]) -> None:
        """Another worker reads these registered slots, by group: of what is cached they are evicted last.

        Nothing holds them. When one is given away all the same, `loans.take_broken` names the key.
        """
        places = []
        for number, some in zip(self._layout.pool_of_group, slots, strict=True):
            self._pools[number].touch(some)
            places += [(number, slot) for slot in some]
        self.loans.begin(key, places)

    def follow(self, chain: Chain, path: list[PrefixNode]) -> None:
        """A sequence that stands nowhere yet takes this path."""
        assert not chain.path
        chain.path = path
        if path:
            self.tree.pin(path[-1])

    def leave(self, chain: Chain) -> None:
        if chain.path:
            self.tree.unpin(chain.path[-1])
        chain.path = []

    def register(self, chain: Chain, ordinal: int, blocks: Sequence[bytes], slots: Sequence[Table]) -> int:
        """Offer the blocks from `ordinal` on, which follow those registered before; `slots[g]`: int32 [n], or -1.

        How many were taken: if not all, one cannot be trusted, and nothing of this chain is taken any more. A block
        that another sequence registered first keeps its slot; this one's stays its own.
        """
        nodes = self._walk(chain, ordinal, blocks[: self._num_trusted(slots, len(blocks))])
        chain.is_stopped = len(nodes) < len(blocks)
        stored: dict[PrefixNode, list[int]] = {}
        for group, (column, number) in enumerate(zip(slots, self._layout.pool_of_group, strict=True)):
            pairs = zip(column[: len(nodes)].tolist(), nodes, strict=True)
            offered = [(slot, node) for slot, node in pairs if slot != NO_SLOT and node.slots[group] == NO_SLOT]
            self._pools[number].register([slot for slot, _ in offered])
            owner = self._owner[number]
            for slot, node in offered:
                node.slots[group] = slot
                owner[slot] = (node, group)
            if self.journal.is_on:
                for _, node in offered:
                    stored.setdefault(node, []).append(group)
        self.journal.store(stored)
        return len(nodes)

    def node_at(self, pool: int, slot: int) -> PrefixNode | None:
        """The block that is registered in this slot."""
        owner = self._owner[pool].get(slot)
        return owner[0] if owner is not None else None

    def unregister(self, top: PrefixNode) -> int:
        """Take a block and all that extends it out of reach, in every group. Returns how many slots that were."""
        slots: list[list[int]] = [[] for _ in self._pools]
        for node in self.tree.cut(top):
            if held := [group for group, slot in enumerate(node.slots) if slot != NO_SLOT]:
                self.journal.drop(node.identity, held)
            for group, slot in enumerate(node.slots):
                if slot != NO_SLOT:
                    number = self._layout.pool_of_group[group]
                    del self._owner[number][slot]
                    slots[number].append(slot)
        for number, (pool, taken) in enumerate(zip(self._pools, slots, strict=True)):
            pool.unregister(taken)
            self.loans.note_gone(number, taken)
        return sum(map(len, slots))

    def count(self, group: int, num_queried: int, num_hit: int) -> None:
        self.counts[group].num_queried += num_queried
        self.counts[group].num_hit += num_hit

    def check_invariants(self) -> None:
        """Nodes and pools agree on every registered slot."""
        self.tree.check_invariants()
        self.loans.check_invariants()
        owned = 0
        for node in self.tree:
            for group, slot in enumerate(node.slots):
                if slot != NO_SLOT:
                    owned += 1
                    number = self._layout.pool_of_group[group]
                    assert self._owner[number].get(slot) == (node, group), "a slot serves two blocks"
                    assert self._pools[number].is_registered(slot), "a known slot is not registered"
        registered = sum(pool.num_registered for pool in self._pools)
        assert owned == sum(map(len, self._owner)) == registered, "a registered slot belongs to no block"

    def _num_trusted(self, slots: Sequence[Table], num_blocks: int) -> int:
        """How many blocks come before the first whose content was found wrong, or may not be finite, in some group."""
        for column, number in zip(slots, self._layout.pool_of_group, strict=True):
            if tainted := self._pools[number].tainted:
                num_blocks = next((n for n, slot in enumerate(column[:num_blocks]) if slot in tainted), num_blocks)
        return num_blocks

    def _walk(self, chain: Chain, ordinal: int, blocks: Sequence[bytes]) -> list[PrefixNode]:
        """The living nodes of these blocks, fewer if one is not to be had; the chain stands on the last, or beyond."""
        if chain.path and chain.path[-1].is_dead:  # the death of any node of a path is that of its last
            return []
        known = chain.path[ordinal : ordinal + len(blocks)]
        if len(known) == len(blocks):
            return known
        assert ordinal + len(known) == len(chain.path)
        before = chain.path[-1] if chain.path else self.tree.root(chain.salt, chain.precision)
        added = self.tree.extend(before, blocks[len(known) :]) if before is not None else []
        if added:
            self.tree.pin(added[-1])
            if chain.path:
                self.tree.unpin(chain.path[-1])
            chain.path += added
        elif not chain.path:
            self.tree.prune(before)
        return known + added

    def _forget(self, number: int, slots: Sequence[int]) -> None:
        """A pool evicts these slots."""
        self.loans.note_gone(number, slots)
        owner = self._owner[number]
        for slot in slots:
            node, group = owner.pop(slot)
            node.slots[group] = NO_SLOT
            self.journal.drop(node.identity, (group,))
            self.tree.prune(node)
