"""A link that drops, duplicates, delays (and so reorders) and truncates, by seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass
class LossyLink:
    """Probabilities per message. `carry` says which copies of it arrive and when; the default link is perfect."""

    seed: int = 0
    drop: float = 0.0
    duplicate: float = 0.0
    truncate: float = 0.0
    jitter_s: float = 0.0
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def carry(self, data: bytes, now: float) -> list[tuple[float, bytes]]:
        """(arrival time, bytes) of every copy that arrives."""
        if self.rng.random() < self.drop:
            return []
        copies = 2 if self.rng.random() < self.duplicate else 1
        return [(now + self.rng.uniform(0, self.jitter_s), self._maybe_cut(data)) for _ in range(copies)]

    def _maybe_cut(self, data: bytes) -> bytes:
        return data[: self.rng.randrange(len(data))] if self.rng.random() < self.truncate else data
