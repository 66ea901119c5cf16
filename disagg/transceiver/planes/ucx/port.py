"""One UCX worker with one endpoint, as a thread uses it: post, let UCX work, sleep on its descriptor.

Threads. Everything here runs on the thread that made the port; UCX needs no lock of ours. UCX starts one thread of its
own per process, which accepts connections and looks after keepalive timers; payload moves only within
`ucp_worker_progress`, which is only called here. So a buffer is touched by UCX between `post` and the return of the
`turn` that reports it, on this thread, and never afterwards.

Memory order. What the sender gathered is written before its message leaves through a socket or a NIC's doorbell, both
of which order it. At the receiver the copy is made, or its completion seen, on this thread; the landing thread hears of
it through a lock and a queue, and gives the staging back through the same lock.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from disagg.transceiver.memory.regions import Bytes
from disagg.transceiver.planes.ucx.library import features, lanes, library, settings
from disagg.transceiver.planes.ucx.strangers import OwnPorts
from disagg.transceiver.wire.errors import PeerLost

PROGRESS_CALLS: Final = 16
"""Calls of UCX before completed messages are looked at: one moves at most 512 KiB over cma."""

CLOSE_S: Final = 1.0
"""A forced close and cancelled receives complete within microseconds of progress; this bounds a fault in UCX."""

_CLOSE_PERIOD_NS: Final = 10**9  # of ucxx, which waits for a progress thread that is not there

OnDone = Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class _Message:
    request: Any
    data: Bytes  # keeps the memory alive that UCX works on
    on_done: OnDone


class Port:
    """Raises `PeerLost` from every method once the endpoint failed: its messages have completed by then."""

    def __init__(self, *, is_loopback: bool, watched: Sequence[int]) -> None:
        """Open a worker. `turn` also wakes for the descriptors `watched`, when they can be read."""
        self._core = core = library()
        self._own_ports = OwnPorts()
        with self._translated(), self._own_ports.noted(lambda: self.address):
            self._context = core.UCXContext(settings(is_loopback), feature_flags=features(core))
            self._worker = core.UCXWorker(self._context)
            self._worker.init_blocking_progress_mode()
        self._endpoint: Any = None
        self._messages: list[_Message] = []
        self._poll = select.poll()
        for fd in (self._worker.epoll_file_descriptor, *watched):
            self._poll.register(fd, select.POLLIN)

    @property
    def address(self) -> bytes:
        return bytes(self._worker.address)

    @property
    def lanes(self) -> str:
        """What it runs over; settled once a message has come from the other end."""
        return lanes(self._endpoint)

    def connect(self, address: bytes) -> None:
        core = self._core
        with self._translated():
            self._endpoint = self._worker.create_endpoint_from_worker_address(
                core.UCXAddress.create_from_buffer(address), endpoint_error_handling=True
            )

    def shut_out_strangers(self) -> None:
        """Call when the peer has connected: no other process can any more. Raises `PeerLost` where that cannot be."""
        self._own_ports.shut()

    def send(self, data: Bytes, tag: int, on_done: OnDone) -> None:
        """`data`, uint8 `[nbytes]`, is UCX's until `on_done`, which `turn` calls."""
        self._post(self._endpoint.tag_send, data, tag, on_done)

    def receive(self, data: Bytes, tag: int, on_done: OnDone) -> None:
        """As `send`. Through the endpoint: ucxx cancels a worker's own receives with the worker only."""
        self._post(self._endpoint.tag_recv, data, tag, on_done)

    def turn(self, wait_s: float | None) -> set[int]:
        """Let UCX work. When no message completed, sleep until UCX or a watched descriptor has something, at most
        `wait_s` (None: as long as it takes). Returns the watched descriptors that can be read."""
        with self._translated():
            while True:
                for _ in range(PROGRESS_CALLS):
                    if not self._worker.progress_once():
                        break
                else:
                    wait_s = 0.0  # there is more to do: only look at the descriptors
                if self._reap():
                    wait_s = 0.0
                # `arm` fails while there are events that progress has not taken: a sleep would miss them.
                if wait_s == 0.0 or self._worker.arm():
                    break
        if self._endpoint is not None and not self._endpoint.alive:
            raise PeerLost("ucx: the endpoint failed")
        timeout_ms = None if wait_s is None else wait_s * 1000
        return {fd for fd, _ in self._poll.poll(timeout_ms)}

    def nudge(self) -> None:
        """Let UCX begin what was just posted, while this thread goes on to something else."""
        with self._translated():
            self._worker.progress_once()

    def close(self) -> None:
        """Cancel every message and wait until it has completed: afterwards UCX touches no memory of ours."""
        with contextlib.suppress(self._core.UCXError):
            if self._endpoint is not None:
                # With error handling a close is forced: it completes what is under way, with an error.
                self._endpoint.close_blocking(_CLOSE_PERIOD_NS, 1)
        until = time.monotonic() + CLOSE_S
        while any(not m.request.completed for m in self._messages) and time.monotonic() < until:
            with contextlib.suppress(self._core.UCXError):
                self._worker.cancel_inflight_requests(0, 1)
                self._worker.progress_once()
        self._messages.clear()
        # In this order, each the last reference: a worker outlives its endpoints, a context its workers.
        self._endpoint = None
        self._worker = None
        self._context = None

    def _post(self, post: Any, data: Bytes, tag: int, on_done: OnDone) -> None:
        from ucxx._lib.arr import Array

        with self._translated():
            request = post(Array(data), self._core.UCXXTag(tag))
        self._messages.append(_Message(request, data, on_done))

    def _reap(self) -> bool:
        """Whether a message completed."""
        done = [message for message in self._messages if message.request.completed]
        if not done:
            return False
        self._messages = [message for message in self._messages if message not in done]
        for message in done:
            message.request.check_error()
        for message in done:
            message.on_done()
        return True

    @contextlib.contextmanager
    def _translated(self) -> Any:
        try:
            yield
        except self._core.UCXError as exc:
            raise PeerLost(f"ucx: {exc}") from exc
