"""What the machine can do by itself: the same watch with no abuse."""

from __future__ import annotations

import time

import pytest
from support.abuse.honest import Ask
from support.abuse.pair import Pair
from support.abuse.watch import watching

pytestmark = pytest.mark.processes


def test_without_abuse_honest_streams_are_whole_and_on_time(pair: Pair, asks: list[Ask]) -> None:
    with watching(pair, asks, baseline_s=1):
        time.sleep(2)
