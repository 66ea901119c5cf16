"""Which workers should have KV of which prompts, by what this router gave them itself. Pure and bounded.

Prompts are known by a chain of names, one for every so many tokens. What a worker has evicted since is not known: it is
asked, and answers what is still there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

MAX_NAMES: Final = 1 << 16
"""Of 64 tokens or more each: 4 million tokens of prompts, more than the pools of a large fleet hold; some 20 MB."""

MAX_HOLDERS: Final = 8
"""Of one name: a system prompt is everywhere, and any of a few will do."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """`num_tokens`: that `incarnation` should have of a prompt."""

    incarnation: str
    num_tokens: int


class PrefixMemory:
    """`note` what a worker has computed or received; ask `holders` of a prompt."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._holders: OrderedDict[bytes, dict[str, int]] = OrderedDict()
        """By name: worker -> tokens that it has behind this name too, 0 where that is another prompt's."""

    def __len__(self) -> int:
        return len(self._holders)

    def note(self, incarnation: str, chain: Sequence[bytes], num_tokens: int) -> None:
        """The worker has the tokens that `chain` names, and `num_tokens` in all of the request that began with them."""
        for place, name in enumerate(chain):
            holders = self._holders.setdefault(name, {})
            self._holders.move_to_end(name)
            is_last = place == len(chain) - 1
            holders[incarnation] = num_tokens if is_last else holders.pop(incarnation, 0)
            if len(holders) > MAX_HOLDERS:
                del holders[next(iter(holders))]
        while len(self._holders) > self._max_names:
            self._holders.popitem(last=False)

    def holders(self, chain: Sequence[bytes], step: int) -> list[Remembered]:
        """Each worker with the most that it should have of this prompt. `step`: tokens that one name stands for."""
        found: dict[str, int] = {}
        for place in range(len(chain), 0, -1):
            for incarnation, beyond in self._holders.get(chain[place - 1], {}).items():
                found.setdefault(incarnation, max(beyond, place * step))
        return [Remembered(incarnation, count) for incarnation, count in found.items()]

    def drop(self, incarnation: str, chain: Sequence[bytes]) -> None:
        """The worker turned out not to have this prompt's."""
        for name in chain:
            if (holders := self._holders.get(name)) is not None:
                holders.pop(incarnation, None)
                if not holders:
                    del self._holders[name]
