"""Workers in turn, whatever they have to do: the baseline that other policies are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from disagg.simulate.handoff import Ground
from disagg.simulate.requests import SimulatedRequest
from disagg.simulate.routing import Route
from disagg.simulate.worker import SimulatedWorker


class InTurn:
    """Each prefill worker meets every decode worker; `both` workers serve alone where there are no pairs."""

    def __init__(self, ground: Ground, workers: Sequence[SimulatedWorker]) -> None:
        self._of = {role: [w.number for w in workers if w.role == role] for role in ("prefill", "decode", "both")}
        self._turn = 0

    def choose(self, request: SimulatedRequest, now: float) -> Route | str:
        """See `Routing.choose`."""
        turn, prefills, decodes = self._turn, self._of["prefill"], self._of["decode"]
        self._turn += 1
        alone = self._of["both"] or prefills
        if request.traced.answer_len == 1 and alone:
            return Route(alone[turn % len(alone)])
        if prefills and decodes:
            return Route(decodes[(turn + turn // len(prefills)) % len(decodes)], prefills[turn % len(prefills)])
        return Route(alone[turn % len(alone)])

    def count(self, request: SimulatedRequest, before: Sequence[int], after: Sequence[int]) -> None:
        """See `Routing.count`; turns know no load."""
