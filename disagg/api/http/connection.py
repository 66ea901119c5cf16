"""One client's connection: uvicorn's protocol with a limit on each wait, and closed so that the last answer arrives.

A socket that is closed while its peer still sends is reset, and the peer loses what it has not read: the answer. So a
connection that ends before its request was read says so (FIN), reads on for a while and only then closes, as RFC 9112
section 9.6 asks for.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, cast

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from disagg.api.http.bodies import BODY_TIMEOUT_S
from disagg.api.http.connections import Activity, Connections
from disagg.api.http.errors import ApiError
from disagg.api.http.h11_connection import MAX_HEAD_LINES, MAX_HEAD_NBYTES, BoundedH11
from disagg.api.http.responses import raw_response

KEEP_ALIVE_S: Final = 75  # over the 60 s of common load balancers, so that those close idle connections first
HEAD_TIMEOUT_S: Final = 20.0  # a head is one packet; 20 s forgive some lost ones
STALL_TIMEOUT_S: Final = 60.0  # a client that reads nothing for so long is gone
LINGER_S: Final = 30.0  # a client that sends 8 MiB at 2 Mbit/s has then sent it
LINGER_QUIET_S: Final = 2.0  # nothing came for so long: the client has stopped, or waits for us
LINGER_NBYTES: Final = 128 * 1024 * 1024  # 16 times the largest body; discarding it costs 0.1 s in all
READ_NBYTES: Final = 64 * 1024  # of one read, and so about what one handler looks at


class HttpConnection(H11Protocol):
    """`book` knows every connection of the listener by its stage."""

    def __init__(self, config: Config, server_state: ServerState, book: Connections, *, is_refused: bool) -> None:
        super().__init__(config, server_state, {})
        self.conn: BoundedH11 = BoundedH11()
        self._book = book
        self._is_refused = is_refused
        self._is_lingering = False
        self._num_discardable = LINGER_NBYTES
        self._stage: tuple[Activity, bool] | None = None
        self._limit: asyncio.TimerHandle | None = None
        self._quiet: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._socket = transport
        transport.max_size = READ_NBYTES  # type: ignore[attr-defined]
        super().connection_made(cast("asyncio.Transport", _LingeringTransport(transport, self)))
        self._settle()
        if self._is_refused:
            self._answer_and_linger(ApiError(503, "the server has as many connections as it may have", retry_after_s=1))

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            self._discard(len(data))
            return
        super().data_received(data)
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._book.remove(self)
        self._set("_limit", None)
        self._set("_quiet", None)
        self._set("_stall", None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set("_stall", STALL_TIMEOUT_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set("_stall", None)

    # --- what uvicorn calls ---

    def handle_events(self) -> None:
        self.conn.refill()
        super().handle_events()
        if self.conn.is_cut:
            self._socket.pause_reading()
            self.loop.call_soon(self._go_on)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._settle()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP. An answer that has begun cannot be changed: it is cut."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application's answer, if one follows, goes nowhere
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.drop()
            return
        status = self.conn.refusal_status
        limits = f": at most {MAX_HEAD_NBYTES} bytes in {MAX_HEAD_LINES} lines are accepted" if status == 431 else ""
        self._answer_and_linger(ApiError(status, f"the request is not HTTP as this server speaks it{limits}"))

    # --- our own ---

    def drop(self) -> None:
        """Close at once; what was not sent yet is lost."""
        self._socket.abort()

    @property
    def is_lingering(self) -> bool:
        return self._is_lingering

    @property
    def may_be_sending(self) -> bool:
        """Whether the client may be in the middle of a request, so that closing would reset it."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR) or self.flow.read_paused

    def linger(self) -> None:
        """Nothing more is sent. What the client still sends is thrown away, until it stops or a bound is met."""
        if self._is_lingering:
            return
        self._is_lingering = True
        self._unset_keepalive_if_required()
        self._socket.write_eof()
        self._socket.resume_reading()
        self._book.place(self, Activity.SILENT)
        self._set("_limit", LINGER_S)
        self._set("_quiet", LINGER_QUIET_S)

    def close(self) -> None:
        """Close when what was written is sent; the client has a while to read it."""
        self._socket.close()
        self._set("_limit", LINGER_S)

    def _discard(self, nbytes: int) -> None:
        self._num_discardable -= nbytes
        if self._num_discardable < 0:
            self.drop()
        else:
            self._set("_quiet", LINGER_QUIET_S)

    def _answer_and_linger(self, error: ApiError) -> None:
        self._socket.write(raw_response(error))
        self.linger()

    def _go_on(self) -> None:
        """Look at the rest of what was read, after others had their turn."""
        if self._is_lingering or self._socket.is_closing():
            return
        self.handle_events()
        self._settle()
        if not self.conn.is_cut and not self.flow.read_paused:
            self._socket.resume_reading()

    def _settle(self) -> None:
        """Note the stage that the connection is in now, with the limit on its length."""
        if self._is_lingering or self._socket.is_closing():
            return
        stage = self._find_stage()
        has_begun = self.conn.has_begun_head
        if self._stage == (stage, has_begun):
            if stage is Activity.RECEIVING:
                self._book.place(self, stage)  # a part of the body came
            return
        self._stage = stage, has_begun
        self._book.place(self, stage)
        waits = {Activity.SILENT: HEAD_TIMEOUT_S, Activity.IDLE: KEEP_ALIVE_S, Activity.ANSWERING: None}
        self._set("_limit", HEAD_TIMEOUT_S if has_begun else waits.get(stage, 2 * BODY_TIMEOUT_S))

    def _find_stage(self) -> Activity:
        if self.cycle is None:
            return Activity.SILENT
        if self.conn.their_state is h11.SEND_BODY:  # a limit of twice the application's own: it answers first
            return Activity.RECEIVING
        return Activity.IDLE if self.cycle.response_complete else Activity.ANSWERING

    def _set(self, timer: str, seconds: float | None) -> None:
        """Start a timer anew, or stop it."""
        running: asyncio.TimerHandle | None = getattr(self, timer)
        if running is not None:
            running.cancel()
        setattr(self, timer, None if seconds is None else self.loop.call_later(seconds, self.drop))


class _LingeringTransport:
    """The transport as uvicorn sees it: closing it lets the client finish."""

    def __init__(self, transport: asyncio.Transport, connection: HttpConnection) -> None:
        self._transport = transport
        self._connection = connection

    def close(self) -> None:
        if self._connection.may_be_sending:
            self._connection.linger()
        else:
            self._connection.close()

    def is_closing(self) -> bool:
        return self._connection.is_lingering or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
