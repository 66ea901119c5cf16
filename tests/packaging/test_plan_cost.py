"""The bookkeeping benchmark's own claims, with room for a busy machine: CPU time, least of many runs, wide bounds."""

from __future__ import annotations

import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.tools import load_script

pytestmark = pytest.mark.processes  # in true time: beside another test it would measure that one too

REPEAT = 20
SHORT, LONG = 1 << 10, 128 << 10


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    """Timed by the CPU time of this thread, which computes all of it: a neighbour's turns are not counted."""
    script = load_script("benchmarks/plan_cost.py")
    script.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[attr-defined]
    return script


def test_a_prompt_of_128k_tokens_over_48_layers_is_planned_in_two_milliseconds(cost: ModuleType) -> None:
    layout = cost.layout_of(with_full=True)
    assert sum(len(group.layers) for group in layout.groups) == 48
    assert cost.least_us(lambda: cost.plan(layout, LONG), REPEAT) < 2000


@pytest.fixture(scope="module")
def windowed(cost: ModuleType) -> tuple[Any, Any]:
    return tuple(cost.measure(cost.layout_of(with_full=False), prompt_len, REPEAT) for prompt_len in (SHORT, LONG))


def test_windowed_bookkeeping_is_flat_in_prompt_length(windowed: tuple[Any, Any]) -> None:
    """128 times the prompt may cost thrice the time: tables are as long as the prompt, but hold a window."""
    short, long = windowed
    assert long.reserve_us < 3 * short.reserve_us
    assert long.decode_us < 2 * short.decode_us


def test_no_turn_of_a_model_thread_is_as_long_as_the_registration_of_128k_tokens(windowed: tuple[Any, Any]) -> None:
    """A received prompt is registered over several steps: 5 ms each, 35 ms were it one. Its match takes 6 ms."""
    short, long = windowed
    assert long.turn_us < 15_000
    assert long.register_us < 3 * 32 * short.register_us  # 2048 blocks, not the prompt's 8192
    assert long.match_us < 15_000


def test_a_row_names_what_it_measured(cost: ModuleType) -> None:
    costs = cost.Cost(1024, 1.0, 2.0, 3.25, 4.0, 5.0, 6.0, 7.0)
    assert costs.row("x") == "| x | 1024 | 1.0 | 2.0 | 3.2 | 4.0 | 5.0 | 6.0 | 7.0 |"
    assert len(cost.COLUMNS) == 7
