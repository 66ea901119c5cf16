"""How fast workers, links and the front end are: measured by `disagg bench rates`, or written by hand.

Tables give seconds for some sizes; between two sizes a line is drawn, beyond the last the last line goes on. A step
with both answers and prompt tokens takes the sum of both, less what a step costs without any token, which is paid once.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any


class RatesRefused(Exception):
    """The rates cannot be used; the message names the field and what was expected."""


class Table:
    """Seconds by size, from (size, seconds) points of ascending size."""

    def __init__(self, points: Mapping[int, float]) -> None:
        self.points = tuple(sorted((int(size), float(seconds)) for size, seconds in points.items()))
        if not self.points or self.points[0][0] < 1:
            raise ValueError("expected seconds for at least one size from 1 on")
        if not all(0 < seconds < float("inf") for _, seconds in self.points):
            raise ValueError("expected seconds above 0")
        self._sizes = [size for size, _ in self.points]
        self._known: dict[int, float] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.points == other.points

    def __hash__(self) -> int:
        return hash(self.points)

    def __call__(self, size: int) -> float:
        """Seconds for this size; 0 for none."""
        if size < 1:
            return 0.0
        if (seconds := self._known.get(size)) is None:
            seconds = self._known[size] = self._between(size)
        return seconds

    def _between(self, size: int) -> float:
        if len(self.points) == 1:
            return self.points[0][1] * size / self.points[0][0]
        right = min(max(1, bisect_left(self._sizes, size)), len(self.points) - 1)
        (low, low_s), (high, high_s) = self.points[right - 1 : right + 1]
        line = low_s + (high_s - low_s) * (size - low) / (high - low)
        return max(line, 0.0) if size > low else min(low_s, max(line, low_s * size / low))


@dataclass(frozen=True)
class ClusterRates:
    """Seconds of one core or device, bytes per second of one link.

    `decode_step_s`: one step by answers in it. `prefill_step_s`: one step by prompt tokens in it. `step_cpu_s`: what a
    worker does beside the model for each step, `handoff_cpu_s` for each transfer at each end. `request_cpu_s`,
    `message_cpu_s`, `token_cpu_s`: what the front end (router, API, client) does for each request, each step of a
    worker and each token of it; it is one process.
    `link_bytes_per_s`, `link_latency_s`: of a worker's link in each direction, for one transfer.
    """

    prefill_step_s: Table
    decode_step_s: Table
    link_bytes_per_s: float = 10e9
    link_latency_s: float = 0.001
    step_cpu_s: float = 0.0
    handoff_cpu_s: float = 0.0
    request_cpu_s: float = 0.0
    message_cpu_s: float = 0.0
    token_cpu_s: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                raise ValueError(f"{one.name} is {value}, expected 0 or more")
        if not self.link_bytes_per_s:
            raise ValueError("link_bytes_per_s is 0, expected more")

    @cached_property
    def empty_step_s(self) -> float:
        """What a step costs before its first token, by the first line of the table of prompts."""
        (small, small_s), *rest = self.prefill_step_s.points
        if not rest:
            return 0.0
        large, large_s = rest[0]
        at_zero = small_s - small * (large_s - small_s) / (large - small)
        return min(max(at_zero, 0.0), self.decode_step_s(1), small_s)

    @cached_property
    def prefill_tokens_per_s(self) -> float:
        """At the best of the sizes that were measured."""
        return max(size / seconds for size, seconds in self.prefill_step_s.points)

    def step_s(self, num_answers: int, num_prompt_tokens: int) -> float:
        """Seconds of one step of a worker."""
        both = self.decode_step_s(num_answers) + self.prefill_step_s(num_prompt_tokens)
        if num_answers and num_prompt_tokens:
            both -= self.empty_step_s
        return both + self.step_cpu_s

    def as_json(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in ("prefill_step_s", "decode_step_s"):
            values[name] = {str(size): seconds for size, seconds in values[name].points}
        return values


def rates_from_json(values: object) -> ClusterRates:
    """Raises RatesRefused."""
    if not isinstance(values, dict):
        raise RatesRefused(f"{str(values)[:40]!r}, expected a JSON object")
    known = {one.name for one in fields(ClusterRates)}
    if unknown := sorted(values.keys() - known):
        raise RatesRefused(f"field `{unknown[0]}` is not known, expected some of {', '.join(sorted(known))}")
    taken = dict(values)
    for name in ("prefill_step_s", "decode_step_s"):
        try:
            taken[name] = Table({int(size): seconds for size, seconds in values[name].items()})
        except (KeyError, AttributeError, TypeError, ValueError) as fault:
            raise RatesRefused(f'`{name}`: {fault}, expected an object like {{"1": 0.01, "8": 0.02}}') from fault
    try:
        return ClusterRates(**taken)
    except (TypeError, ValueError) as fault:
        raise RatesRefused(str(fault)) from fault


def read_rates(path: Path) -> ClusterRates:
    """The rates of a file. Raises RatesRefused."""
    try:
        return rates_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as fault:
        raise RatesRefused(f"rates `{path}` cannot be read: {fault}") from fault
    except RatesRefused as fault:
        raise RatesRefused(f"rates `{path}`: {fault}") from fault
