"""Blocks of this worker hashed a second time, off the model thread: has their memory changed since they were final?

A prefix hit asks before anything is computed from its blocks; a peer's failed verification asks whose fault it was.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from disagg.engine.commands import PrefixChecked, PrefixHitEvent, SuspectEvent
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.wire.errors import SourceChanged
from disagg.worker.parts import WorkerParts

log = logging.getLogger(__name__)

RESULTS = {True: "same", False: "changed", None: "unknown"}
"""`unknown`: there is no earlier digest of the block, or it was given away before it could be hashed."""


class Rechecks:
    """Answers the engine's questions about blocks. Event loop only."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts

    async def check_hit(self, event: PrefixHitEvent) -> None:
        """Hash the blocks that a prompt wants to begin with, and tell the engine which are as they were."""
        results = await self._look(event.units)
        self._count("prefix_hit", results)
        wrong = tuple(unit for unit, same in zip(event.units, results, strict=True) if same is False)
        right = tuple(unit for unit, same in zip(event.units, results, strict=True) if same is not False)
        if wrong:
            log.error("%d registered blocks are not what was hashed, and with them what extends them is given up: "
                      "memory of this machine has changed (%s)", len(wrong), _names(wrong))  # fmt: skip
        self._parts.model.submit(PrefixChecked(event.key, event.check_id, right, wrong))

    async def look_at_suspects(self, event: SuspectEvent) -> None:
        """A peer saw other bytes than were hashed here: say whether they are still those, and so where they changed."""
        results = await self._look(event.units)
        self._count("peer", results)
        log.error("of the blocks that the peer reports for %s, %d are as they were hashed here, %d have changed here, "
                  "%d cannot be told any more", event.key.transfer_id, *map(results.count, RESULTS))  # fmt: skip

    async def _look(self, units: Sequence[SourceUnit]) -> tuple[bool | None, ...]:
        parts = self._parts
        try:
            return await parts.cuts.kept.recheck(units, parts.landing.digest_units)
        except SourceChanged:  # the caller has let go of them, and another sequence writes there
            return (None,) * len(units)

    def _count(self, why: str, results: Sequence[bool | None]) -> None:
        for same, count in Counter(results).items():
            self._parts.metrics.count_rehashed(why, RESULTS[same], count)


def _names(units: Sequence[SourceUnit]) -> str:
    return ", ".join(f"group {unit.group} block {unit.ordinal}" for unit in units[:8])
