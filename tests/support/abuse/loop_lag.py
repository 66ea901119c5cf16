"""The event loops' own account of how late they ran: `disagg_loop_lag_seconds`, a histogram per process."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

BUCKET = re.compile(r"^disagg_(?:worker_)?loop_lag_seconds_bucket(?P<labels>\{.*\}) (?P<count>\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
Loop = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LoopLags:
    """Per loop, named by its labels, how many ticks were late by at most so many seconds."""

    counts: dict[Loop, dict[float, float]]

    @classmethod
    def read(cls, metrics: str) -> LoopLags:
        """From Prometheus text."""
        counts: dict[Loop, dict[float, float]] = defaultdict(dict)
        for match in BUCKET.finditer(metrics):
            labels = dict(LABEL.findall(match["labels"]))
            bound = float(labels.pop("le"))
            counts[tuple(sorted(labels.items()))][bound] = float(match["count"])
        return cls(dict(counts))

    def since(self, earlier: LoopLags) -> LoopLags:
        """What came after `earlier`."""
        none: dict[float, float] = {}
        return LoopLags(
            {
                loop: {bound: count - earlier.counts.get(loop, none).get(bound, 0) for bound, count in found.items()}
                for loop, found in self.counts.items()
            }
        )

    def num_ticks(self, loop: Loop) -> float:
        return max(self.counts.get(loop, {}).values(), default=0)

    def all_ticks(self) -> dict[Loop, float]:
        return {loop: self.num_ticks(loop) for loop in self.counts}

    def p99_s(self) -> dict[Loop, float]:
        """Per loop the least bound that holds 99 % of its ticks."""
        found = {}
        for loop, counts in self.counts.items():
            total = self.num_ticks(loop)
            found[loop] = min(bound for bound, count in counts.items() if count >= 0.99 * total)
        return found
