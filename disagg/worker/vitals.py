"""What the router must learn of this process in time: that it lives, and what the step computes that may end it.

pulse thread   every heartbeat, unless the event loop hangs or the model thread is dead
model thread   before a step whose new requests differ from the last one's, over a socket of its own: queued without
               waiting, and written by libzmq's thread while the step computes
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import urlsplit

import zmq

from disagg.engine.commands import AttemptKey
from disagg.transceiver.wire.errors import TransceiverError
from disagg.transceiver.wire.messages.ranges import MAX_LEASED
from disagg.transceiver.wire.messages.router import Pulse
from disagg.transceiver.wire.pulse import LoopTurns, PulseThread, Route, open_pulse_socket, send_pulse
from disagg.transceiver.wire.sockets import Sockets, bracketed
from disagg.transceiver.wire.timing import LOST_S

log = logging.getLogger(__name__)

InStep = tuple[tuple[str, int], ...]

UNHEARD_S: Final = 2 * LOST_S
"""Without one pulse of the router for so long after registering, an operator is told: a firewall may be in between."""


class StepNews:
    """Announces the new requests of a step. `tell` belongs to the model thread, all else to the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._aim: tuple[str, zmq.Socket[bytes] | None, Callable[[Pulse], None]] | None = None
        self._told: InStep = ()

    @property
    def told(self) -> InStep:
        """The new requests of the step that began last."""
        return self._told

    def aim(self, incarnation: str, socket: zmq.Socket[bytes] | None, otherwise: Callable[[Pulse], None]) -> None:
        """From the next step on tell by this socket; `otherwise` takes what it cannot, on any thread."""
        with self._lock:  # which also hands the socket from thread to thread
            self._aim, self._told = (incarnation, socket, otherwise), ()

    def rest(self) -> None:
        """The registration is over: no router is told anything. Closes the socket."""
        with self._lock:
            aim, self._aim = self._aim, None
            if aim is not None and aim[1] is not None:
                aim[1].close()

    def tell(self, keys: Sequence[AttemptKey]) -> None:
        """A step with these new requests is about to begin. Costs nothing when they are those of the last one."""
        in_step = tuple(dict.fromkeys((key.transfer_id, key.epoch) for key in keys))[:MAX_LEASED]
        if in_step == self._told:
            return
        with self._lock:
            self._told = in_step
            if self._aim is not None:
                incarnation, socket, otherwise = self._aim
                pulse = Pulse(incarnation, in_step)
                if socket is None or not send_pulse(socket, pulse):
                    otherwise(pulse)


class RouterPulse:
    """Of one registration: sends this worker's pulses to the router and notes the router's. Event loop only."""

    def __init__(self, socket: zmq.Socket[bytes], incarnation: str, router: str, is_sound: Callable[[], bool]) -> None:
        self._socket, self._mine, self._router, self._is_sound = socket, Pulse(incarnation), router, is_sound
        self._turns = LoopTurns()
        self._began_at = time.monotonic()
        self.heard_at = float("-inf")
        self._thread = PulseThread(socket, self._beat, self._hear)
        self._thread.start()

    @property
    def is_unheard(self) -> bool:
        """The router said a port and nothing came from it, for long."""
        return self.heard_at == float("-inf") and time.monotonic() - self._began_at > UNHEARD_S

    def close(self) -> None:
        self._thread.close()
        self._turns.close()

    def _beat(self) -> None:
        if self._is_sound() and not self._turns.is_hung:
            send_pulse(self._socket, self._mine)

    def _hear(self, route: Route, pulse: Pulse) -> None:
        if pulse.incarnation == self._router:
            self.heard_at = time.monotonic()


class Vitals:
    """What a process gives each of its registrations: how to tell that it lives, and what to say if it broke."""

    def __init__(self, sockets: Sockets, is_sound: Callable[[], bool]) -> None:
        """`is_sound`, on any thread: False once the model thread is dead."""
        self.news = StepNews()
        self._sockets, self._is_sound = sockets, is_sound

    @property
    def died_in(self) -> InStep | None:
        """Once the model thread is dead: the new requests of its last step."""
        return None if self._is_sound() else self.news.told

    def begin(
        self, endpoint: str, port: int, incarnation: str, router: str, send: Callable[[Pulse], None]
    ) -> RouterPulse | None:
        """A registration began at the router at `endpoint`, which hears pulses at `port`; 0 = it hears none.

        `send`: over the control link.
        """
        loop = asyncio.get_running_loop()

        def otherwise(pulse: Pulse) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(send, pulse)

        sockets = self._connect_two(endpoint, port) if port else None
        if sockets is None:
            self.news.aim(incarnation, None, otherwise)
            return None
        self.news.aim(incarnation, sockets[0], otherwise)
        return RouterPulse(sockets[1], incarnation, router, self._is_sound)

    def _connect_two(self, endpoint: str, port: int) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]] | None:
        opened: list[zmq.Socket[bytes]] = []
        try:
            opened = [self._connect(endpoint, port)]
            return opened[0], self._connect(endpoint, port)
        except (zmq.ZMQError, TransceiverError) as exc:
            log.warning("no pulses: %s; while this process is busy it counts as lost after %g s", exc, LOST_S)
            for socket in opened:
                socket.close()
            return None

    def _connect(self, endpoint: str, port: int) -> zmq.Socket[bytes]:
        socket = open_pulse_socket(self._sockets, zmq.DEALER)
        self._sockets.connect(socket, f"tcp://{bracketed(urlsplit(endpoint).hostname or '')}:{port}")
        return socket
