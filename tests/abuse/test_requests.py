"""Accepted requests at the ends of every field: none of them fails, ends a process or disturbs another."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from functools import partial
from itertools import chain

import pytest
from support.abuse.aside import aside
from support.abuse.extremes import extremes, honoured
from support.abuse.fuzz import REQUIRED, any_extremes, every_extreme, fire
from support.abuse.honest import Ask
from support.abuse.pair import Pair
from support.abuse.watch import watching

SEED = 20
MIN_ACCEPTED = 0.9  # of what was sent: the rest are combinations that one sentence refuses
BASELINE_S = 1.0


@pytest.mark.processes
@pytest.mark.parametrize(
    ("num_parts", "num_shots", "seconds", "patience_s"),
    [
        pytest.param(1, 200, 4, 4, id="short"),
        pytest.param(2, 2500, 300, 45, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_accepted_requests_at_the_ends_of_every_field(
    pair: Pair, asks: list[Ask], num_parts: int, num_shots: int, seconds: float, patience_s: float
) -> None:
    rng = random.Random(SEED)
    alone = list(every_extreme())
    rng.shuffle(alone)  # a short run sees some of each field, the long one all of them
    with watching(pair, asks, BASELINE_S) as watch:
        shots = chain(alone, any_extremes(rng))
        statuses: Counter[str] = Counter()
        for part in range(num_parts):
            if part:
                watch.note_warm()
            firing = fire(pair.api.url, shots, num_shots=num_shots, seconds=seconds, patience_s=patience_s)
            tally = aside(partial(asyncio.run, firing))
            watch.wrong += tally.wrong
            watch.late += tally.late
            statuses += tally.statuses
        watch.figures["requests"] = str(dict(statuses))
        if statuses["200"] < MIN_ACCEPTED * statuses.total():
            watch.wrong.append(f"most requests should be accepted: {dict(statuses)}")


def test_every_honoured_field_has_two_ends_or_the_one_value_that_it_accepts() -> None:
    for endpoint in REQUIRED:
        for row in honoured(endpoint):
            assert len(extremes(row)) >= (1 if row.is_fixed else 2), f"{row.name}: {extremes(row)}"
