"""A naive cache: a list of what each sequence holds, a list of what is kept, and walks over token positions.

Knows no slot, no tree and no hash. It says what may be reused, what fits, and which blocks are evicted: of those that
are kept and referred to by nobody the ones released first, the deepest ordinals of one release before the others.
Shares no arithmetic with `disagg.cache`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from support.oracles.cache_oracle import needed_blocks, outdated_blocks, readable_later, resident_blocks

from disagg.cache.layout import CacheLayout

Tokens = tuple[int, ...]
Name = tuple[int, str, Tokens]
"""(group, salt, all tokens up to the end of the block)"""


@dataclass(eq=False)
class Block:
    """One block of one group somewhere. `name`: what others find it by; a block that lost trust is never named."""

    pool: int
    name: Name | None = None
    is_distrusted: bool = False
    num_refs: int = 1


@dataclass(eq=False)
class Holding:
    """What one sequence holds: (group, ordinal) -> block, and per pool the scratch slots of a step in progress."""

    salt: str
    blocks: dict[tuple[int, int], Block] = field(default_factory=dict)
    num_scratch: list[int] = field(default_factory=list)


class NaivePrefixes:
    """`num_slots[p]`: usable slots of pool p."""

    def __init__(self, layout: CacheLayout, num_slots: Iterable[int]) -> None:
        self.layout, self.size = layout, layout.block_size
        self.num_empty = list(num_slots)
        self.kept: list[list[Block]] = [[] for _ in self.num_empty]
        self.named: dict[Name, Block] = {}
        self.holdings: dict[Hashable, Holding] = {}

    # --- what may be reused -----------------------------------------------------------------------------------

    def longest(self, salt: str, tokens: Tokens) -> int:
        """Tokens of the longest whole-block prefix, short of the last token, that every group can go on from."""
        return max(m for m in range(0, len(tokens), self.size) if self._can_go_on(salt, tokens[:m]))

    def held(self, group: int, salt: str, tokens: Tokens) -> list[int]:
        """Needed ordinals that are whole and there, whichever they are."""
        spec = self.layout.groups[group]
        return [
            ordinal
            for ordinal in needed_blocks(len(tokens), spec.window, spec.num_sink_tokens, self.size)
            if (ordinal + 1) * self.size <= len(tokens) and self._name(group, salt, tokens, ordinal) in self.named
        ]

    def _can_go_on(self, salt: str, tokens: Tokens) -> bool:
        return all(
            self._name(number, salt, tokens, t // self.size) in self.named
            for number, group in enumerate(self.layout.groups)
            for t in range(len(tokens))
            if readable_later(t, len(tokens), group.window, group.num_sink_tokens)
        )

    def _name(self, group: int, salt: str, tokens: Tokens, ordinal: int) -> Name:
        return group, salt, tokens[: (ordinal + 1) * self.size]

    # --- who holds what ---------------------------------------------------------------------------------------

    def open(self, key: Hashable, salt: str) -> None:
        self.holdings[key] = Holding(salt, num_scratch=[0] * self.layout.num_pools)

    def take(self, key: Hashable, tokens: Tokens, ordinals: Iterable[tuple[int, int]]) -> None:
        """Refer to named blocks, (group, ordinal)."""
        holding = self.holdings[key]
        for group, ordinal in ordinals:
            block = self.named[self._name(group, holding.salt, tokens, ordinal)]
            block.num_refs += 1
            if block in self.kept[block.pool]:
                self.kept[block.pool].remove(block)
            holding.blocks[group, ordinal] = block

    def reuse(self, key: Hashable, tokens: Tokens) -> None:
        """Take what goes on being read after the longest prefix."""
        length = self.longest(self.holdings[key].salt, tokens)
        live = [
            (number, ordinal)
            for number, group in enumerate(self.layout.groups)
            for ordinal in resident_blocks(length, length, group, self.size)
        ]
        self.take(key, tokens, live)

    def resize(self, key: Hashable, capacity: int, history: int, until: int = 0) -> bool:
        """As `KVCache.resize`. False, with nothing changed, when a pool is short."""
        holding = self.holdings[key]
        wanted, num_scratch = self._demand(capacity, history, until)
        gone = [place for place in holding.blocks if place not in wanted]
        room = [e + len(k) + s for e, k, s in zip(self.num_empty, self.kept, holding.num_scratch, strict=True)]
        for place in gone:
            room[holding.blocks[place].pool] += holding.blocks[place].num_refs == 1
        new = [place for place in sorted(wanted) if place not in holding.blocks]
        needed = list(num_scratch)
        for group, _ in new:
            needed[self.layout.pool_of_group[group]] += 1
        if any(need > have for need, have in zip(needed, room, strict=True)):
            return False
        self._end_scratch(holding)
        for group, ordinal in sorted(gone, key=lambda place: (place[0], -place[1])):
            self._drop(holding.blocks.pop((group, ordinal)))
        for pool, need in enumerate(needed):
            self._make_empty(pool, need)
            self.num_empty[pool] -= need
        holding.num_scratch = num_scratch
        holding.blocks |= {place: Block(self.layout.pool_of_group[place[0]]) for place in new}
        return True

    def close(self, key: Hashable) -> None:
        holding = self.holdings.pop(key)
        self._end_scratch(holding)
        for place in sorted(holding.blocks, key=lambda place: (-place[1], place[0])):
            self._drop(holding.blocks[place])

    def write_down(self, key: Hashable, tokens: Tokens, before: int, committed: int) -> None:
        """The sequence registered its blocks of tokens [before, committed)."""
        holding = self.holdings[key]
        for ordinal in range(before // self.size, committed // self.size):
            for group in range(self.layout.num_groups):
                block, name = holding.blocks.get((group, ordinal)), self._name(group, holding.salt, tokens, ordinal)
                if block is not None and name not in self.named:
                    assert not block.is_distrusted
                    assert block.name is None
                    block.name, self.named[name] = name, block

    def strike_out(self, salt: str, prefix: Tokens) -> None:
        """Nobody finds a block that begins with these tokens any more."""
        for name in [n for n in self.named if n[1] == salt and n[2][: len(prefix)] == prefix]:
            block = self.named.pop(name)
            block.name, block.is_distrusted = None, True
            if block in self.kept[block.pool]:
                self.kept[block.pool].remove(block)
                self.num_empty[block.pool] += 1

    def _demand(self, capacity: int, history: int, until: int) -> tuple[set[tuple[int, int]], list[int]]:
        """Blocks with a slot of their own, and per pool the fewest slots that hold those without."""
        wanted, num_scratch = set(), [0] * self.layout.num_pools
        for number, group in enumerate(self.layout.groups):
            live, scratch = resident_blocks(capacity, history, group, self.size), set[int]()
            if pages := self.layout.scratch_pages(number) if until else 0:
                scratch = live & set(outdated_blocks(history, capacity, until, group, self.size))
                num_scratch[self.layout.pool_of_group[number]] -= -len(scratch) // pages
            wanted |= {(number, ordinal) for ordinal in live - scratch}
        return wanted, num_scratch

    def _end_scratch(self, holding: Holding) -> None:
        for pool, count in enumerate(holding.num_scratch):
            self.num_empty[pool] += count
        holding.num_scratch = [0] * len(self.num_empty)

    def _drop(self, block: Block) -> None:
        block.num_refs -= 1
        if block.num_refs == 0 and block.name is not None:
            self.kept[block.pool].append(block)
        elif block.num_refs == 0:
            self.num_empty[block.pool] += 1

    def _make_empty(self, pool: int, count: int) -> None:
        while self.num_empty[pool] < count:
            name = self.kept[pool].pop(0).name
            assert name is not None
            del self.named[name]
            self.num_empty[pool] += 1
