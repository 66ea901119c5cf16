"""The largest legal bodies, sixteen at once: slow for the clients that send them and for no other."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from support.abuse.aside import aside
from support.abuse.bodies import KINDS, post_at_once
from support.abuse.honest import Ask
from support.abuse.pair import Pair
from support.abuse.watch import watching

pytestmark = pytest.mark.processes

NUM_AT_ONCE = 16
BASELINE_S = 1.0
NAMES = list(KINDS)
OF_EACH_KIND = NAMES[:NUM_AT_ONCE]
LONG_ROUNDS = [[name] * NUM_AT_ONCE for name in NAMES] + [OF_EACH_KIND, NAMES[-NUM_AT_ONCE:]]


@pytest.mark.parametrize(
    "rounds",
    [
        pytest.param([OF_EACH_KIND], id="short"),
        pytest.param(LONG_ROUNDS, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_the_largest_bodies_at_once(pair: Pair, asks: list[Ask], rounds: list[list[str]]) -> None:
    with watching(pair, asks, BASELINE_S) as watch:
        for names in rounds:
            posting = post_at_once(pair.api.url, names)
            answers = aside(partial(asyncio.run, posting))
            watch.wrong += answers.wrong
            watch.late += answers.late
            seconds, slowest = answers.slowest
            what = names[0] if len(set(names)) == 1 else "all kinds"
            watch.figures[f"{len(names)} of {what}"] = f"{dict(answers.statuses)}, slowest {slowest} {seconds:.1f} s"
