"""What runs come to: percentiles, what is good, a table of all and bars of some."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from disagg.simulate.figures import (
    Figures,
    Objectives,
    is_good,
    percentiles,
    weighted_percentiles,
)
from disagg.simulate.fleet import FleetShape, parse_fleet
from disagg.simulate.plots import PLOTS, bars, round_above, write_plots
from disagg.simulate.report import COLUMNS, row_of
from disagg.simulate.requests import SimulatedRequest
from disagg.simulate.trace import TracedRequest


def some_figures(policy: str = "least-loaded", fleet: str = "1p1d", goodput: float = 2.5) -> Figures:
    return Figures(
        policy=policy,
        fleet=fleet,
        num_requests=10,
        num_refused=1,
        span_s=4.0,
        ttft_s={"p50": 0.1, "p90": 0.2, "p99": 0.3},
        itl_s={"p50": 0.01, "p90": 0.02, "p99": 0.03},
        e2e_s={"p50": 1.0, "p90": 2.0, "p99": 3.0},
        tokens_per_s=100.0,
        requests_per_s=2.25,
        good=0.8,
        goodput=goodput,
        hit_rate=0.25,
        num_fetched_tokens=0,
        num_computed_tokens=1000,
        handoff_nbytes={"full": 1024, "window-64": 1024},
        prefix_nbytes={"full": 0, "window-64": 0},
        busy={"prefill": 0.5, "decode": 0.25},
        batch=3.5,
        num_evicted=0,
        num_dropped=0,
        num_events=99,
        estimate_error=None,
    )


def test_a_percentile_is_the_smallest_value_that_so_many_percent_do_not_exceed() -> None:
    assert percentiles([float(n) for n in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    assert percentiles([]) == {}
    assert weighted_percentiles([(2.0, 98), (9.0, 2), (1.0, 0)]) == {"p50": 2.0, "p90": 2.0, "p99": 9.0}


@pytest.mark.parametrize(
    ("first_at", "ended_at", "answer_len", "good"),
    [(1.0, 1.9, 10, True), (2.1, 2.2, 10, False), (1.0, 2.1, 10, False), (1.0, 9.0, 1, True)],
)
def test_a_request_is_good_when_its_first_token_and_the_mean_of_the_others_are_in_time(
    first_at: float, ended_at: float, answer_len: int, good: bool
) -> None:
    request = SimulatedRequest(0, TracedRequest(0.0, 5, answer_len, ()))
    request.first_at, request.ended_at = first_at, ended_at
    assert is_good(request, Objectives(2.0, 0.1)) is good


def test_objectives_that_are_no_times_are_refused() -> None:
    with pytest.raises(ValueError, match="itl_s: 0"):
        Objectives(1.0, 0.0)


def test_a_row_has_a_cell_for_each_column() -> None:
    row = dict(zip(COLUMNS, row_of(some_figures()), strict=True))
    assert row["policy"] == "least-loaded"
    assert row["good"] == "80.0%"
    assert row["moved"] == "2 KiB"
    assert row["busy"] == "P 50% D 25%"
    assert row["refused"] == "1"


def test_plots_are_pictures_with_a_bar_for_each_run(tmp_path: Path) -> None:
    found = [some_figures(policy, fleet, n) for n, (policy, fleet) in enumerate((p, f) for p in "ab" for f in "xyz")]
    paths = write_plots(found, tmp_path / "plots")
    assert [path.stem for path in paths] == list(PLOTS)
    for path in paths:
        drawn = [
            element
            for element in ET.fromstring(path.read_text()).iter("{http://www.w3.org/2000/svg}rect")
            if element.get("width") not in ("720", "10")
        ]
        assert len(drawn) == len(found)


def test_a_bar_is_as_high_as_its_value_on_the_scale_and_names_are_escaped() -> None:
    def heights(goodput: float) -> list[float]:
        text = bars("a < b", [some_figures(goodput=goodput), some_figures("other", goodput=10.0)], lambda f: f.goodput)
        drawn = ET.fromstring(text).iter("{http://www.w3.org/2000/svg}rect")
        return [float(r.get("height", "0")) for r in drawn if r.get("width") not in ("720", "10")]

    for goodput in (0.0, 2.5, 5.0):
        mine, other = heights(goodput)
        assert mine == pytest.approx(other * goodput / 10, abs=0.1)


@pytest.mark.parametrize(("value", "above"), [(0, 1), (0.03, 0.05), (1, 1), (3, 5), (99, 100), (101, 200), (5e9, 5e9)])
def test_a_scale_ends_at_a_round_number(value: float, above: float) -> None:
    assert round_above(value) == pytest.approx(above)


def test_fleets_are_read_as_they_are_said() -> None:
    assert parse_fleet("2P6D") == FleetShape(prefill=2, decode=6)
    assert str(parse_fleet("1p1d2b")) == "1p1d2b"
    assert parse_fleet("1p1d1b").roles == ("prefill", "decode", "both")


@pytest.mark.parametrize("text", ["", "1p", "2x", "p1d1", "1p1d1p", "0b", "1p 1d"])
def test_a_fleet_that_cannot_serve_or_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_fleet(text)
