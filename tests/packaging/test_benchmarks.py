"""What the benchmark makes of its samples."""

from __future__ import annotations

from types import ModuleType

import pytest
from support.tools import load_script


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    return load_script("benchmarks/serve.py")


def test_a_row_holds_medians_over_all_rounds(serve: ModuleType) -> None:
    one = serve.Round([serve.Sample(0.1, 0.5, 5), serve.Sample(0.3, 0.7, 5)], wall_s=1.0)
    two = serve.Round([serve.Sample(0.2, 0.6, 5)], wall_s=1.0)
    assert serve.row("x", [one, two]) == "| x | 200 | 300 | 100.0 | 8 |"


@pytest.mark.parametrize(("part", "value"), [(0.0, 1), (0.5, 6), (0.9, 10), (1.0, 10)])
def test_a_quantile_is_one_of_the_values(serve: ModuleType, part: float, value: int) -> None:
    assert serve.quantile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], part) == value


def test_prompts_are_repeatable_begin_with_bos_and_alternate_in_length(serve: ModuleType) -> None:
    drawn = serve.prompts(4, seed=1)
    assert drawn == serve.prompts(4, seed=1)
    assert drawn != serve.prompts(4, seed=2)
    assert [len(prompt) for prompt in drawn] == [48, 400, 48, 400]
    assert all(prompt[0] == 2 and min(prompt[1:]) > 2 and max(prompt) < 2048 for prompt in drawn)
