"""The workers' pulses as the router hears them, off its event loop: which live, and what is in the step that runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import zmq

from disagg.transceiver.wire.codec import encode
from disagg.transceiver.wire.messages.router import Pulse
from disagg.transceiver.wire.pulse import LoopTurns, PulseThread, Route, open_pulse_socket, send_pulse
from disagg.transceiver.wire.sockets import Sockets, bracketed

Steps = Mapping[str, int]
"""Transfer id to epoch: the new requests of a worker's step."""


class Pulses:
    """Made on the event loop; the thread notes what it hears of incarnations that are watched, and of no other."""

    def __init__(
        self, sockets: Sockets, endpoint: str, incarnation: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Listens on the host of `endpoint`, at a port that is free. Raises `EndpointRefused`."""
        self._clock = clock
        self._mine = encode(Pulse(incarnation))
        self._lock = threading.Lock()
        self._heard_at: dict[str, float] = {}
        self._in_step: dict[str, Steps] = {}
        self._routes: dict[str, Route] = {}
        self._turns = LoopTurns()
        self._socket = open_pulse_socket(sockets, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a lost connection is an error here, and its route goes
        try:
            bound = sockets.bind(self._socket, f"tcp://{bracketed(urlsplit(endpoint).hostname or '')}:0")
        except BaseException:
            self._socket.close()
            raise
        self.port = int(bound.rsplit(":", 1)[1])
        self._thread = PulseThread(self._socket, self._beat, self._hear)
        self._thread.start()

    def watch(self, incarnation: str, now: float) -> None:
        """From here on its pulses count."""
        with self._lock:
            self._heard_at.setdefault(incarnation, now)

    def forget(self, incarnation: str) -> None:
        with self._lock:
            for known in (self._heard_at, self._in_step, self._routes):
                known.pop(incarnation, None)

    def heard_at(self, incarnation: str) -> float:
        """The last sign of life by the router's clock; minus infinity for an incarnation that is not watched."""
        with self._lock:
            return self._heard_at.get(incarnation, float("-inf"))

    def in_step(self, incarnation: str) -> Steps:
        """The new requests of the step that this worker last began."""
        with self._lock:
            return self._in_step.get(incarnation, {})

    def note(self, pulse: Pulse) -> None:
        """From any thread: also what came by the control link, where a worker cannot reach this port."""
        with self._lock:
            if pulse.incarnation in self._heard_at:
                self._heard_at[pulse.incarnation] = self._clock()
                if pulse.in_step is not None:
                    self._in_step[pulse.incarnation] = dict(pulse.in_step)

    def close(self) -> None:
        self._thread.close()
        self._turns.close()

    # --- the thread -----------------------------------------------------------------------------------------

    def _hear(self, route: Route, pulse: Pulse) -> None:
        self.note(pulse)
        if pulse.in_step is None:  # from the worker's pulse thread, which listens; its model thread does not
            with self._lock:
                if pulse.incarnation in self._heard_at:
                    self._routes[pulse.incarnation] = route

    def _beat(self) -> None:
        if self._turns.is_hung:
            return
        with self._lock:
            routes = list(self._routes.items())
        for incarnation, route in routes:
            if not send_pulse(self._socket, self._mine, route):
                with self._lock:
                    self._routes.pop(incarnation, None)
