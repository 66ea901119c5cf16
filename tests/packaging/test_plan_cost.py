"""The bookkeeping benchmark's own claims, with room for a busy machine: least of many runs, wide bounds."""

from __future__ import annotations

from types import ModuleType

import pytest
from support.tools import load_script

REPEAT = 20
SHORT, LONG = 1 << 10, 128 << 10


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    return load_script("benchmarks/plan_cost.py")


def test_a_prompt_of_128k_tokens_over_48_layers_is_planned_in_two_milliseconds(cost: ModuleType) -> None:
    layout = cost.layout_of(with_full=True)
    assert sum(len(group.layers) for group in layout.groups) == 48
    assert cost.least_us(lambda: cost.plan(layout, LONG), REPEAT) < 2000


def test_windowed_bookkeeping_is_flat_in_prompt_length(cost: ModuleType) -> None:
    """128 times the prompt may cost twice the time: tables are as long as the prompt, but hold a window."""
    layout = cost.layout_of(with_full=False)
    short, long = (cost.measure(layout, prompt_len, REPEAT) for prompt_len in (SHORT, LONG))
    assert long.reserve_us < 2 * short.reserve_us
    assert long.decode_us < 2 * short.decode_us


def test_a_row_names_what_it_measured(cost: ModuleType) -> None:
    assert cost.Cost(1024, 1.0, 2.0, 3.25, 4.0).row("x") == "| x | 1024 | 1.0 | 2.0 | 3.2 | 4.0 |"
