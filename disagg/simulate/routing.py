"""Where a request goes: the product's own choice, made for workers that exist as records alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from disagg.simulate.requests import SimulatedRequest


@dataclass(frozen=True, slots=True)
class Route:
    """Numbers of workers. `server` generates the answer; without `prefill` it computes the prompt too.

    `source`: where the first `fetched` blocks of the prompt come from to the worker that computes it.
    `num_expected_cached`: tokens that need not be computed, as far as the router knows; `estimate_s`: of its time to the
    first token, 0 where none is made.
    """

    server: int
    prefill: int | None = None
    source: int | None = None
    fetched: int = 0
    num_expected_cached: int = 0
    estimate_s: float = 0.0


class Routing(Protocol):
    """Chooses for one request at a time, and is told what became of it."""

    def choose(self, request: SimulatedRequest, now: float) -> Route | str:
        """A route, or why there is none."""

    def count(self, request: SimulatedRequest, before: Sequence[int], after: Sequence[int]) -> None:
        """A request was at the workers `before` and is at those `after`: placed, answering (its prefill worker is done
        with it), or gone."""
