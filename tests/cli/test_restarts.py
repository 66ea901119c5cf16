from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg.cli.restarts import FIRST_DELAY_S, MAX_RESTARTS, WINDOW_S, Restarts


def test_delays_double_and_end() -> None:
    restarts = Restarts()
    delays = [restarts.next_delay_s(float(n)) for n in range(MAX_RESTARTS + 1)]
    assert delays == [0.5, 1.0, 2.0, 4.0, 8.0, None]


def test_a_quiet_minute_forgives() -> None:
    restarts = Restarts()
    assert [restarts.next_delay_s(n * WINDOW_S) for n in range(9)] == [FIRST_DELAY_S] * 9


@given(st.lists(st.floats(0, 30), max_size=40))
def test_no_window_has_more_restarts_than_allowed(gaps: list[float]) -> None:
    restarts, now, granted = Restarts(), 0.0, []
    for gap in gaps:
        now += gap
        if restarts.next_delay_s(now) is not None:
            granted.append(now)
        assert sum(now - WINDOW_S < time for time in granted) <= MAX_RESTARTS
