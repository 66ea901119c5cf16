"""Which blocks of past requests a simulated worker still has: the prefix cache of `disagg.cache`, without memory.

What a running request refers to is pinned;
what none refers to stays, and goes least recently used first, the deepest first of one release, as soon as pools are
promised to running requests. The promises are those of `disagg.cache.admission`, in slots.

Simpler than the cache itself: a request takes as many slots as it was promised, and blocks are kept and dropped in
units of the trace's size; of groups that share a pool, the one that keeps most loses blocks first. Tests compare both
on one schedule.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from disagg.cache.admission import Peaks, Promises
from disagg.simulate.geometry import KvGeometry, Runs, runs_in

Blocks = Sequence[int]
"""Numbers of blocks of the trace, each of which stands for all tokens up to its end."""


@dataclass(slots=True, eq=False)
class Holding:
    """What one request refers to: `pinned[g]`, blocks of group g in order of their ordinals."""

    blocks: Blocks
    pinned: list[list[int]]


def _ignore(group: int, blocks: Blocks, kept: bool) -> None:
    """Nothing is told of blocks."""


class BlockStore:
    """One worker's."""

    def __init__(
        self,
        geometry: KvGeometry,
        num_slots: Sequence[int],
        *,
        reuses: bool = True,
    ) -> None:
        """`num_slots` per pool, the reserved ones included. `reuses`: False keeps nothing."""
        self._geometry, self._reuses = geometry, reuses
        self.groups = geometry.layout.groups
        self.tell: Callable[[int, Blocks, bool], None] = _ignore
        """Told of the blocks of a group that are registered (True) and dropped (False)."""
        self.unit = geometry.unit
        """Tokens of a block of the trace."""
        self.promises = Promises(num_slots)
        groups = range(geometry.layout.num_groups)
        self._refs: list[dict[int, int]] = [{} for _ in groups]
        self._cached: list[OrderedDict[int, None]] = [OrderedDict() for _ in groups]
        self._groups_of = [[g for g in groups if geometry.layout.pool_of_group[g] == p] for p in range(len(num_slots))]
        self._full = [g for g in groups if geometry.layout.groups[g].window is None]
        self._windowed = [g for g in groups if geometry.layout.groups[g].window is not None]
        self.num_evicted = 0

    # --- what is there --------------------------------------------------------------------------------------

    def usable(self, blocks: Blocks, prompt_len: int) -> int:
        """Most blocks from which all groups can go on computing; the last token is always computed."""
        if not self._cached:
            return 0
        count = min(len(blocks), (prompt_len - 1) // self.unit)
        for group in self._full:
            count = self._leading(group, blocks, count)
        while count and not all(self._can_go_on(group, blocks, count) for group in self._windowed):
            count -= 1
        return count

    def held(self, blocks: Blocks, prompt_len: int) -> tuple[Runs, ...]:
        """Per group, which blocks are there of those that go on being read after the prompt."""
        return tuple(self._held(group, blocks, prompt_len) for group in range(len(self._cached)))

    def read_at(self, count: int) -> tuple[Runs, ...]:
        """Per group, which of the first `count` blocks are read by what follows them."""
        return tuple(self._geometry.needed(group, count * self.unit, self.unit) for group in range(len(self._cached)))

    def _leading(self, group: int, blocks: Blocks, most: int) -> int:
        refs, cached = self._refs[group], self._cached[group]
        for ordinal in range(most):
            block = blocks[ordinal]
            if block not in refs and block not in cached:
                return ordinal
        return most

    def _can_go_on(self, group: int, blocks: Blocks, count: int) -> bool:
        refs, cached = self._refs[group], self._cached[group]
        return all(
            block in refs or block in cached
            for first, end in self._geometry.needed(group, count * self.unit, self.unit)
            for block in blocks[first:end]
        )

    def _held(self, group: int, blocks: Blocks, prompt_len: int) -> Runs:
        refs, cached = self._refs[group], self._cached[group]
        there = []
        for first, end in self._whole(group, prompt_len, len(blocks)):
            some = enumerate(blocks[first:end], first)
            there += [ordinal for ordinal, block in some if block in refs or block in cached]
        return runs_in(there)

    def _whole(self, group: int, num_tokens: int, num_named: int) -> Runs:
        """Of the named blocks the whole ones that are read after so many tokens."""
        most = min(num_named, num_tokens // self.unit)
        needed = self._geometry.needed(group, num_tokens, self.unit)
        return tuple((first, min(end, most)) for first, end in needed if first < most)

    # --- a request's life -----------------------------------------------------------------------------------

    def try_promise(self, key: Hashable, peaks: Peaks) -> bool:
        """Slots for a request, for which cached blocks may have to go."""
        if not self.promises.try_promise(key, peaks):
            return False
        self._evict()
        return True

    def begin(self, blocks: Blocks, runs: Sequence[Runs]) -> Holding:
        """Refer to those of the blocks, which are there."""
        held = Holding(blocks, [[] for _ in self._cached])
        if self._reuses:
            for group, some in enumerate(runs):
                self._pin(held, group, some)
        return held

    def register(self, held: Holding, first: int, last: int, num_tokens: int, *, received: bool = False) -> None:
        """Blocks [first, last) are computed, or `received`: then those are there that are read after `num_tokens`."""
        if not self._reuses or first >= last:
            return
        for group in range(len(self._cached)):
            read = tuple((max(low, first), end) for low, end in self._whole(group, num_tokens, last) if end > first)
            self._keep(group, held.blocks, read if received else ((first, last),))
            self._pin(held, group, read)
        self._evict()

    def take_in(self, blocks: Blocks, num_tokens: int) -> None:
        """Keep the blocks of a fetched prefix that are read after it; nothing refers to them yet."""
        held = Holding(blocks, [[] for _ in self._cached])
        self.register(held, 0, len(blocks), num_tokens, received=True)
        self.release(held)

    def release(self, held: Holding) -> None:
        """Refer to nothing; the deepest blocks will be dropped first."""
        for group, blocks in enumerate(held.pinned):
            refs, last = self._refs[group], []
            for block in reversed(blocks):
                if (count := refs[block]) > 1:
                    refs[block] = count - 1
                else:
                    del refs[block]
                    last.append(block)
            self._cached[group].update(dict.fromkeys(last))
        held.pinned = [[] for _ in self._cached]
        self._evict()

    def _pin(self, held: Holding, group: int, runs: Runs) -> None:
        refs, cached = self._refs[group], self._cached[group]
        for first, end in runs:
            blocks = held.blocks[first:end]
            for block in filter(cached.__contains__, blocks):
                del cached[block]
            for block in blocks:
                refs[block] = refs.get(block, 0) + 1
            held.pinned[group] += blocks

    def _keep(self, group: int, blocks: Blocks, runs: Runs) -> None:
        refs, cached = self._refs[group], self._cached[group]
        fresh = [b for first, end in runs for b in blocks[first:end] if b not in refs and b not in cached]
        if fresh:
            cached.update(dict.fromkeys(fresh))
            self.tell(group, fresh, True)

    def _evict(self) -> None:
        """Drop what no longer fits beside what running requests were promised."""
        weight = self._geometry.blocks_per_unit
        for groups, usable, promised in zip(self._groups_of, self.promises.usable, self.promises.promised, strict=True):
            excess = sum(len(self._cached[group]) for group in groups) - (usable - promised) // weight
            while excess > 0:
                group = max(groups, key=lambda one: len(self._cached[one]))
                others = max((len(self._cached[one]) for one in groups if one != group), default=0)
                cached = self._cached[group]
                dropped = [cached.popitem(last=False)[0] for _ in range(min(excess, max(1, len(cached) - others)))]
                excess -= len(dropped)
                self.num_evicted += len(dropped)
                self.tell(group, dropped, False)

    def check_invariants(self) -> None:
        self.promises.check_invariants()
        for refs, cached in zip(self._refs, self._cached, strict=True):
            assert all(count > 0 for count in refs.values()), "a block is pinned by nothing"
            assert not cached.keys() & refs.keys(), "a pinned block may be dropped"
        for groups, usable, promised in zip(self._groups_of, self.promises.usable, self.promises.promised, strict=True):
            kept = sum(len(self._cached[group]) for group in groups) * self._geometry.blocks_per_unit
            assert kept <= max(0, usable - promised), "cached blocks lie in promised slots"

    def resident(self, group: int) -> Iterable[int]:
        """The blocks of a group that are there, pinned or not."""
        return (*self._refs[group], *self._cached[group])
