"""The event loops' own account of how late they ran, a histogram per process.

`disagg_loop_held_seconds` is judged: how late a loop was by its own process's doing. That it had no core is the
doing of the abuse's own clients and of the machine's other users, and only shown, by `disagg_loop_lag_seconds`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

HELD, LAG = "held", "lag"
BUCKET = r"^disagg_(?:worker_)?loop_{}_seconds_bucket(?P<labels>\{{.*\}}) (?P<count>\S+)$"
LABEL = re.compile(r'(\w+)="([^"]*)"')
Loop = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LoopLags:
    """Per loop, named by its labels, how many ticks were late by at most so many seconds."""

    counts: dict[Loop, dict[float, float]]

    @classmethod
    def read(cls, metrics: str, which: str = HELD) -> LoopLags:
        """From Prometheus text."""
        counts: dict[Loop, dict[float, float]] = defaultdict(dict)
        for match in re.finditer(BUCKET.format(which), metrics, re.MULTILINE):
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
        """Per loop the least bound that holds 99 % of its ticks, or all but one where there are fewer: in
        a second a single tick is two of a hundred. A loop that stands still for longer is late in several at once."""
        found = {}
        for loop, counts in self.counts.items():
            total = self.num_ticks(loop)
            found[loop] = min(bound for bound, count in counts.items() if count >= total - max(1.0, 0.01 * total))
        return found
