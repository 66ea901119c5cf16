"""h11 with a bound on what one look at a client's bytes may cost, whatever the bytes are."""

from __future__ import annotations

import re
from typing import Any, Final

import h11
from h11._writers import ChunkedWriter

MAX_HEAD_NBYTES: Final = 16 * 1024  # what h11, nginx and Apache allow for, in all, within a factor of two
MAX_HEAD_LINES: Final = 128  # a line costs h11 about 4 us; clients behind proxies send 30
MAX_EVENTS: Final = 64  # chunks of a body, 15 us each, so that a body of one-byte chunks leaves time for others
BLANK_LINE: Final = re.compile(rb"\n\r?\n")


class BoundedH11(h11.Connection):
    """Gives out at most `MAX_EVENTS` per `refill`; `is_cut` says that more were there. Refuses large heads."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_NBYTES)
        self.is_cut = False
        self.refusal_status = 400
        self._num_left = MAX_EVENTS

    def refill(self) -> None:
        self._num_left = MAX_EVENTS
        self.is_cut = False

    def next_event(self) -> Any:
        if self._num_left == 0:
            self.is_cut = True
            return h11.NEED_DATA
        self._num_left -= 1
        try:
            if self.their_state is h11.IDLE:
                self._check_head()
            return super().next_event()
        except h11.RemoteProtocolError as exc:
            self.refusal_status = exc.error_status_hint
            raise

    def send(self, event: Any) -> Any:
        """As h11's, which takes 15 us for a chunk of a stream; a token has no more than that for all of its way."""
        if type(event) is h11.Data and type(self._writer) is ChunkedWriter and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data) if event.data else b""
        return super().send(event)

    @property
    def has_begun_head(self) -> bool:
        return self.their_state is h11.IDLE and bool(self.trailing_data[0])

    def _check_head(self) -> None:
        """h11 bounds a head that is not complete; one that comes at once may be as large as a read."""
        unread = self.trailing_data[0]
        blank = BLANK_LINE.search(unread)
        end = len(unread) if blank is None else blank.start()
        if end > MAX_HEAD_NBYTES or unread.count(b"\n", 0, end) > MAX_HEAD_LINES:
            raise h11.RemoteProtocolError("the request's head is too large", error_status_hint=431)
