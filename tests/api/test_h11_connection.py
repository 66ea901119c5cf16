"""What `BoundedH11` writes on its short way, against h11's own writer."""

from __future__ import annotations

from collections.abc import Sequence

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.api.http.h11_connection import BoundedH11

Event = h11.Response | h11.Data | h11.EndOfMessage

PIECES = st.one_of(st.just(b""), st.binary(max_size=40), st.integers(0, 70_000).map(lambda count: b"\r\n" * count))
DATA = PIECES.map(lambda data: h11.Data(data=data))
EVENTS = st.tuples(st.lists(DATA, max_size=8), st.lists(st.one_of(st.just(h11.EndOfMessage()), DATA), max_size=3))
REQUESTS = (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n")
HEADS = ([], [("content-length", "12")], [("transfer-encoding", "chunked")])


def written(connection: h11.Connection, asked: bytes, events: Sequence[Event]) -> list[object]:
    """After each event: its bytes, or the kind of error, and the state."""
    connection.receive_data(asked)
    while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED) and connection.their_state is not h11.DONE:
        pass
    seen: list[object] = []
    for event in events:
        try:
            seen.append(bytes(connection.send(event) or b""))
        except h11.LocalProtocolError as exc:
            seen.append(type(exc))
        seen.append(connection.our_state)
    return seen


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("asked", REQUESTS)
@given(EVENTS)
def test_every_answer_has_the_bytes_and_errors_of_h11(
    asked: bytes, head: list[tuple[str, str]], events: tuple[list[Event], list[Event]]
) -> None:
    body, after = events
    whole = [h11.Response(status_code=200, headers=head), *body, *after]
    assert written(BoundedH11(), asked, whole) == written(h11.Connection(h11.SERVER), asked, whole)


def test_the_short_way_is_taken_for_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: what is compared above is not h11 with itself."""
    sent: list[type] = []
    whole_way = h11.Connection.send

    def noted(self: h11.Connection, event: Event) -> bytes | None:
        sent.append(type(event))
        return whole_way(self, event)

    monkeypatch.setattr(h11.Connection, "send", noted)
    events = [h11.Response(status_code=200, headers=[]), h11.Data(data=b"token"), h11.EndOfMessage()]
    seen = written(BoundedH11(), REQUESTS[0], events)
    assert seen[2] == b"5\r\ntoken\r\n"
    assert sent == [h11.Response, h11.EndOfMessage]
