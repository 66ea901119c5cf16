"""What the benchmark makes of its samples."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
from support.tools import load_script

from disagg.bench.overlap import Overlap


@pytest.fixture(scope="module")
def serve() -> ModuleType:
    return load_script("benchmarks/serve.py")


def test_a_row_holds_medians_over_all_rounds(serve: ModuleType) -> None:
    one = serve.Round([serve.Sample(0.1, 0.5, 5, 0.001), serve.Sample(0.3, 0.7, 5, 0.004)], wall_s=1.0)
    two = serve.Round([serve.Sample(0.2, 0.6, 5, 0.002)], wall_s=1.0)
    assert serve.row("x", [one, two]) == "| x | 200.0 | 300.0 | 2.0 | 0.0 | 100.0 | 8 |"


def test_a_request_is_exposed_from_the_end_of_prefill_to_its_licence_to_decode(serve: ModuleType) -> None:
    timeline = {"queue": 0.5, "prefill": 0.25, "transfer_wait": 0.125, "wire": 0.25, "verify": 0.5, "first_token": 1.0}
    assert serve.exposed_s(timeline) == 0.875
    assert serve.exposed_s({"queue": 0.5, "prefill": 0.25, "first_token": 1.0}) == 0.0


@pytest.mark.parametrize(("part", "value"), [(0.0, 1), (0.5, 6), (0.9, 10), (1.0, 10)])
def test_a_quantile_is_one_of_the_values(serve: ModuleType, part: float, value: int) -> None:
    assert serve.quantile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], part) == value


def test_prompts_are_repeatable_begin_with_bos_and_alternate_in_length(serve: ModuleType) -> None:
    drawn = serve.prompts(4, seed=1)
    assert drawn == serve.prompts(4, seed=1)
    assert drawn != serve.prompts(4, seed=2)
    assert [len(prompt) for prompt in drawn] == [48, 400, 48, 400]
    assert all(prompt[0] == 2 and min(prompt[1:]) > 2 and max(prompt) < 2048 for prompt in drawn)


@pytest.fixture(scope="module")
def overlap() -> ModuleType:
    return load_script("benchmarks/overlap.py")


HELD = Overlap("shm", "full", 128 << 20, 16 << 20, exposed_s=0.005, exposed_after_prefill_s=0.025)
NOT_HELD = {
    "above the bound": replace(HELD, model="windowed", exposed_s=0.010),
    "above a quarter": replace(HELD, exposed_s=0.007),
}


@pytest.mark.parametrize(("result", "verdict"), [(HELD, "yes"), *((result, "no") for result in NOT_HELD.values())])
def test_a_row_of_the_overlap_says_whether_it_is_held(overlap: ModuleType, result: Overlap, verdict: str) -> None:
    assert overlap.row(result).endswith(f"| {verdict} |")


@pytest.mark.parametrize("result", [HELD, *NOT_HELD.values()])
@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_a_bound_that_is_not_held_is_an_exit_code_for_who_asks(
    overlap: ModuleType, monkeypatch: pytest.MonkeyPatch, result: Overlap, flags: list[str]
) -> None:
    monkeypatch.setattr(overlap, "measure_overlap", lambda *arguments, **options: result)
    assert overlap.main(["--planes", "shm", *flags]) == (1 if flags and result is not HELD else 0)
