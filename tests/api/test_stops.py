from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from disagg.api.text.stops import StopMatcher

LETTERS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def run(stops: list[str], parts: list[str], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include=include)
    out = ""
    for part in parts:
        out += matcher.push(part)
        if matcher.matched is not None:
            return out, matcher.matched
    return out + matcher.flush(), None


def oracle(stops: list[str], text: str, watched_from: int = 0) -> tuple[str, str | None]:
    """Read one character at a time; the first moment at which the text ends in a stop string ends it."""
    for end in range(watched_from + 1, len(text) + 1):
        if ended := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


def cut(text: str, sizes: list[int]) -> list[str]:
    parts = []
    for size in sizes:
        parts.append(text[:size])
        text = text[size:]
    return [*parts, text]


@given(stops=STOPS, text=LETTERS, sizes=st.lists(st.integers(0, 5), max_size=10))
def test_any_cutting_of_the_text_stops_where_reading_it_letter_by_letter_does(
    stops: list[str], text: str, sizes: list[int]
) -> None:
    assert run(stops, cut(text, sizes)) == oracle(stops, text)


@given(stops=STOPS, text=LETTERS, sizes=st.lists(st.integers(0, 5), max_size=10))
def test_text_given_out_is_never_taken_back(stops: list[str], text: str, sizes: list[int]) -> None:
    expected, _ = oracle(stops, text)
    matcher = StopMatcher(stops)
    out = ""
    for part in cut(text, sizes):
        out += matcher.push(part)
        assert expected.startswith(out)
        if matcher.matched is not None:
            break


@given(stops=STOPS, text=LETTERS, sizes=st.lists(st.integers(0, 5), max_size=10))
def test_including_the_stop_string_appends_exactly_it(stops: list[str], text: str, sizes: list[int]) -> None:
    out, matched = run(stops, cut(text, sizes), include=True)
    expected, stop = oracle(stops, text)
    assert (out, matched) == (expected + (stop or ""), stop)


@given(stops=STOPS, early=LETTERS, late=LETTERS)
def test_a_stop_string_counts_only_when_it_completes_after_the_minimum(stops: list[str], early: str, late: str) -> None:
    matcher = StopMatcher(stops)
    out = matcher.push(early, may_stop=False) + matcher.push(late)
    if matcher.matched is None:
        out += matcher.flush()
    assert (out, matcher.matched) == oracle(stops, early + late, watched_from=len(early))


def test_text_that_cannot_become_a_stop_string_is_not_held() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("an EN") == "an "
    assert matcher.push("?") == "EN?"
