"""Which workers there are: so many of each role, with the pools that a worker with such settings has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from disagg.cache.layout import CacheLayout

_COUNT: Final = re.compile(r"(\d+)([pdb])")
ROLE_OF: Final = {"p": "prefill", "d": "decode", "b": "both"}


@dataclass(frozen=True, slots=True)
class FleetShape:
    """Workers by role. Raises ValueError for one that could not serve."""

    prefill: int = 0
    decode: int = 0
    both: int = 0

    def __post_init__(self) -> None:
        if not (self.both or (self.prefill and self.decode)):
            raise ValueError(f"{self}: expected a prefill and a decode worker, or one that does both")

    @property
    def roles(self) -> tuple[str, ...]:
        """Of each worker."""
        return ("prefill",) * self.prefill + ("decode",) * self.decode + ("both",) * self.both

    def __str__(self) -> str:
        counts = ((self.prefill, "p"), (self.decode, "d"), (self.both, "b"))
        return "".join(f"{count}{letter}" for count, letter in counts if count) or "no worker"


def parse_fleet(text: str) -> FleetShape:
    """`1p1d`, `4b`, `2p6d2b`. Raises ValueError."""
    found = _COUNT.findall(text.lower())
    letters = [letter for _, letter in found]
    if "".join(count + letter for count, letter in found) != text.lower() or len(set(letters)) < len(letters):
        raise ValueError(f"fleet `{text}`: expected counts of prefill, decode and `both` workers, such as 2p6d or 4b")
    return FleetShape(**{ROLE_OF[letter]: int(count) for count, letter in found})


@dataclass(frozen=True, slots=True)
class WorkerKind:
    """What all workers have in common. `num_slots` per pool of `layout`, the reserved ones included."""

    layout: CacheLayout
    num_slots: tuple[int, ...]
    max_model_len: int = 1 << 30
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    reuses_prefixes: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens}, expected at least max_num_seqs "
                f"({self.max_num_seqs}), which is 1 or more"
            )
        if len(self.num_slots) != self.layout.num_pools:
            raise ValueError(f"num_slots: {len(self.num_slots)} pools, expected {self.layout.num_pools}")
