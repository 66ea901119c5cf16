"""What may be reused, found by walking positions over a plain list of what lies in which slot. Knows no tree, no hash.

Every registered block is written down with the whole prefix that its KV depends on; it counts as long as its slot's
generation has not changed. Shares no arithmetic with `disagg.cache`.
"""

from __future__ import annotations

from dataclasses import dataclass

from support.cache_oracle import needed_blocks, readable_later

from disagg.cache.cache import CachedSequence, KVCache

Name = tuple[int, str, tuple[int, ...]]
"""(group, salt, all tokens up to the end of the block)"""


@dataclass(frozen=True)
class Place:
    pool: int
    slot: int
    generation: int


class NaivePrefixes:
    def __init__(self, cache: KVCache) -> None:
        self.cache, self.size = cache, cache.layout.block_size
        self.places: dict[Name, Place] = {}

    def place(self, group: int, slot: int) -> Place:
        pool = self.cache.layout.pool_of_group[group]
        return Place(pool, slot, int(self.cache.pools[pool].generations[slot]))

    def is_alive(self, place: Place | None) -> bool:
        return place is not None and self.cache.pools[place.pool].generations[place.slot] == place.generation

    def has(self, group: int, salt: str, prefix: tuple[int, ...]) -> bool:
        return self.is_alive(self.places.get((group, salt, prefix)))

    def write_down(self, sequence: CachedSequence, salt: str, tokens: tuple[int, ...], before: int) -> None:
        """The sequence registered the blocks of tokens [before, committed)."""
        for ordinal in range(before // self.size, sequence.committed // self.size):
            prefix = tokens[: (ordinal + 1) * self.size]
            for group, table in enumerate(sequence.tables):
                if table[ordinal] >= 0 and not self.has(group, salt, prefix):
                    self.places[group, salt, prefix] = self.place(group, int(table[ordinal]))

    def strike_out(self, salt: str, prefix: tuple[int, ...]) -> None:
        for name in [n for n in self.places if n[1] == salt and n[2][: len(prefix)] == prefix]:
            del self.places[name]

    def longest(self, salt: str, tokens: tuple[int, ...]) -> int:
        """Tokens of the longest whole-block prefix, short of the last token, that every group can go on from."""
        return max(m for m in range(0, len(tokens), self.size) if self._can_go_on(salt, tokens[:m]))

    def held(self, group: int, salt: str, tokens: tuple[int, ...]) -> list[int]:
        """Needed ordinals that are whole and there, whichever they are."""
        spec = self.cache.layout.groups[group]
        return [
            ordinal
            for ordinal in needed_blocks(len(tokens), spec.window, spec.num_sink_tokens, self.size)
            if (ordinal + 1) * self.size <= len(tokens) and self.has(group, salt, tokens[: (ordinal + 1) * self.size])
        ]

    def _can_go_on(self, salt: str, tokens: tuple[int, ...]) -> bool:
        return all(
            self.has(number, salt, tokens[: (t // self.size + 1) * self.size])
            for number, group in enumerate(self.cache.layout.groups)
            for t in range(len(tokens))
            if readable_later(t, len(tokens), group.window, group.num_sink_tokens)
        )
