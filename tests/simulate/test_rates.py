"""Rates: what lies between measured sizes, and what is refused by its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from disagg.simulate.rates import ClusterRates, RatesRefused, Table, rates_from_json, read_rates


def test_between_two_sizes_and_beyond_the_last_a_line_is_drawn() -> None:
    table = Table({2: 1.0, 4: 2.0, 8: 2.4})
    assert [table(size) for size in (2, 3, 4, 6, 8, 12)] == pytest.approx([1.0, 1.5, 2.0, 2.2, 2.4, 2.8])
    assert table(0) == 0.0


def test_below_the_first_size_a_step_never_costs_more_and_never_less_than_its_share() -> None:
    assert Table({8: 1.0, 16: 1.2})(4) == pytest.approx(0.9)
    assert Table({8: 1.0, 16: 3.0})(4) == pytest.approx(0.5)
    assert Table({8: 1.0})(4) == pytest.approx(0.5)


def test_a_step_of_both_kinds_pays_once_for_what_costs_without_tokens() -> None:
    rates = ClusterRates(Table({10: 3.0, 20: 5.0}), Table({1: 2.0, 2: 2.5}), step_cpu_s=0.25)
    assert rates.empty_step_s == 1.0
    assert rates.step_s(0, 10) == 3.25
    assert rates.step_s(2, 0) == 2.75
    assert rates.step_s(2, 10) == 3.0 + 2.5 - 1.0 + 0.25


def test_rates_are_read_as_they_were_written(tmp_path: Path) -> None:
    rates = ClusterRates(Table({16: 0.01}), Table({1: 0.002, 8: 0.004}), 1e9, 0.5, about={"machine": "a"})
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(rates.as_json()))
    assert read_rates(path) == rates


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (3, "expected a JSON object"),
        ({}, "`prefill_step_s`"),
        ({"decode_step_s": {"1": 0.1}, "prefill_step_s": {"0": 1}}, "`prefill_step_s`: expected seconds for at least"),
        ({"decode_step_s": {"1": -1}, "prefill_step_s": {"1": 1}}, "`decode_step_s`: expected seconds above 0"),
        ({"decode_step_s": {"1": 1}, "prefill_step_s": {"1": 1}, "speed": 3}, "field `speed` is not known"),
        ({"decode_step_s": {"1": 1}, "prefill_step_s": {"1": 1}, "token_cpu_s": -1}, "token_cpu_s is -1"),
        ({"decode_step_s": {"1": 1}, "prefill_step_s": {"1": 1}, "link_bytes_per_s": 0}, "link_bytes_per_s is 0"),
    ],
)
def test_rates_that_cannot_be_used_are_refused_by_their_field(values: Any, named: str) -> None:
    with pytest.raises(RatesRefused) as refused:
        rates_from_json(values)
    assert named in str(refused.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RatesRefused, match="cannot be read"):
        read_rates(tmp_path / "absent")
