"""The sender's end of the zmq plane: KV in joined frames over tcp, for peers that share nothing but a network.

A slice is one message, a head and one frame that holds whole slots in the slice's order. Its bytes are gathered once,
into a buffer of their own, and sent once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import zmq

from disagg.transceiver.layout.runs import adjacent, ints
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.copying import check_generations, copy_rows
from disagg.transceiver.memory.regions import Bytes, PoolRegion
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.planes.probe import send_probe
from disagg.transceiver.planes.tokens import OneTimeTokens
from disagg.transceiver.planes.zmq.frames import (
    REFUSED,
    WELCOME,
    WINDOW,
    Credit,
    DataHello,
    ProbeRequest,
    SliceHead,
    pack,
    parse,
)
from disagg.transceiver.wire.connection import FrameReader
from disagg.transceiver.wire.errors import PeerLost, RemoteProtocolError
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.sockets import Sockets, bracketed, reason

log = logging.getLogger(__name__)

_MAX_RECEIVED_NBYTES = 4096
"""Receivers say hello and grant credit: tens of bytes."""


class ZmqSourcePlane(SourcePlane):
    name = "zmq"
    sends_bytes = True

    def __init__(
        self,
        host: str,
        keys: ClusterKeys,
        *,
        port: int = 0,
        advertised_host: str = "",
        advertised_port: int = 0,
        sockets: Sockets | None = None,
    ) -> None:
        """Listen on `host` (port 0 = any free one); peers are told the advertised address where that differs.

        `sockets`: of this process, closed by the caller after the plane; without it the plane makes its own.
        """
        self._bind_to = f"tcp://{bracketed(host)}:{port}"
        self._advertised_host, self._advertised_port = advertised_host or host, advertised_port
        self._keys = keys
        self._tokens = OneTimeTokens()
        self._pools: tuple[PoolRegion, ...] = ()
        self._receivers: dict[str, _Window] = {}
        self._peer_of: dict[bytes, str] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._address = ""
        self._shared = sockets
        self._owned: Sockets | None = None
        self._is_open = False
        self.num_malformed = 0

    async def start(self, pools: Sequence[PoolRegion]) -> None:
        """Listen on a free port. Raises `EndpointRefused`."""
        self._pools = tuple(pools)
        sockets = self._shared
        if sockets is None:
            sockets = self._owned = Sockets(self._keys)
        # Twice the window: a slice never meets a full queue, since it waits for credit first.
        self._socket = sockets.open(
            zmq.ROUTER, max_message_nbytes=_MAX_RECEIVED_NBYTES, high_water_mark=2 * WINDOW, carries_data=True
        )
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._incoming = FrameReader(self._socket)
        try:
            endpoint = sockets.bind(self._socket, self._bind_to)
        except BaseException:
            self._release()
            raise
        self._is_open = True
        port = self._advertised_port or endpoint.rpartition(":")[2]
        self._address = f"tcp://{bracketed(self._advertised_host)}:{port}"
        self._gatherer = ThreadPoolExecutor(1, thread_name_prefix="zmq-gather")
        self._listening = asyncio.create_task(self._listen(), name="zmq plane")

    def offer(self, peer: str) -> PlaneOffer:
        return PlaneOffer(self.name, self._address, self._tokens.mint(peer))

    async def send(
        self,
        peer: str,
        transfer_id: str,
        epoch: int,
        number: int,
        units: Sequence[SourceUnit],
        regions: Sequence[PoolRegion] | None = None,
    ) -> None:
        """Send one slice; returns when libzmq has it. Waits while the receiver holds a full window.

        Raises `PeerLost`, or `SourceChanged` when a slot was given away before its bytes were copied: nothing is sent.
        """
        window = self._receivers.get(peer)
        if window is None:
            raise PeerLost(f"decode worker {peer} has not opened the zmq plane")
        await window.take()
        try:
            gathering = asyncio.get_running_loop().run_in_executor(
                self._gatherer, self._gather, units, regions or self._pools
            )
            payload = await gathering
            if window.is_lost:
                raise PeerLost(f"decode worker {peer} is gone")
            self._send_slice(peer, window, pack(SliceHead(transfer_id, epoch, number, payload.nbytes)), payload)
        except BaseException:
            window.give(1)  # nothing left this process
            raise

    async def drop(self, peer: str) -> None:
        self._tokens.revoke(peer)
        window = self._forget(peer)
        if window is not None:
            self._reply(window.routing_id, REFUSED)  # a ROUTER cannot close one connection: the receiver does

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        tasks = {self._listening, *self._probes}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for peer in tuple(self._receivers):
            self._forget(peer)
        self._gatherer.shutdown()  # waits for a window of memcpys at most: their senders then hear `PeerLost`
        self._incoming.close()
        self._release()

    def _release(self) -> None:
        self._socket.close()
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    # --- slices -----------------------------------------------------------------------------------------------

    def _gather(self, units: Sequence[SourceUnit], regions: Sequence[PoolRegion]) -> Bytes:
        """The bytes of `units` joined, uint8 `[nbytes]`. Runs on the gathering thread."""
        pools, slots = ints([u.pool for u in units]), ints([u.slot for u in units])
        planned = ints([u.generation for u in units])
        sizes = [regions[unit.pool].slots.shape[1] for unit in units]
        payload = np.empty(sum(sizes), dtype=np.uint8)
        offset = 0
        check_generations(regions, pools, slots, planned)
        for start, stop in adjacent(pools, slots):
            first, count, nbytes = units[start].slot, stop - start, (stop - start) * sizes[start]
            rows = payload[offset : offset + nbytes].reshape(count, sizes[start])
            copy_rows(rows, regions[units[start].pool].slots[first : first + count])
            offset += nbytes
        check_generations(regions, pools, slots, planned)
        return payload

    def _send_slice(self, peer: str, window: _Window, head: bytes, payload: Bytes) -> None:
        # copy=False is safe: the buffer was made for this message, it is not written again, and pyzmq keeps it alive
        # until libzmq has sent or dropped it. Sending slots themselves would not be: they may be freed before then.
        sent = asyncio.ensure_future(
            self._socket.send_multipart([window.routing_id, head, payload.data], flags=zmq.DONTWAIT, copy=False)
        )
        error = sent.exception()  # DONTWAIT: the future is done when it is made
        if isinstance(error, zmq.ZMQError):
            self._lose(peer)
            raise PeerLost(f"decode worker {peer} is gone: {reason(error)}") from error
        if error is not None:
            raise error

    # --- receivers --------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            frames = await self._incoming.receive()
            try:
                if len(frames) != 2:
                    raise RemoteProtocolError(f"{len(frames) - 1} frames, expected 1")
                self._take(frames[0].bytes, parse(frames[1].bytes))
            except Exception as exc:
                if not isinstance(exc, RemoteProtocolError):
                    log.error("data plane zmq cannot take a message", exc_info=exc)
                self.num_malformed += 1
                self._give_up(frames[0].bytes)

    def _give_up(self, routing_id: bytes) -> None:
        """What a receiver said was damaged, maybe credit: better it connects anew than that its window never opens."""
        if (peer := self._peer_of.get(routing_id)) is not None:
            self._reply(routing_id, REFUSED)
            self._lose(peer)

    def _may_probe(self, routing_id: bytes) -> bool:
        peer = self._peer_of.get(routing_id)
        return peer is not None and self._receivers[peer].may_probe()

    def _take(self, routing_id: bytes, head: DataHello | Credit | ProbeRequest | SliceHead) -> None:
        match head:
            case DataHello(incarnation, token):
                self._reply(routing_id, WELCOME if self._admit(routing_id, incarnation, token) else REFUSED)
            case Credit(num_slices) if (peer := self._peer_of.get(routing_id)) is not None:
                self._receivers[peer].give(num_slices)
            case ProbeRequest() if self._may_probe(routing_id):
                self._spawn(send_probe(self, self._peer_of[routing_id], self._pools))
            case _:
                raise RemoteProtocolError("a receiver sent a slice, a second probe, or credit before its hello")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="zmq probe")
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    def _admit(self, routing_id: bytes, peer: str, token: bytes) -> bool:
        if not self._tokens.redeem(peer, token):
            return False
        self._forget(peer)
        self._receivers[peer] = _Window(routing_id)
        self._peer_of[routing_id] = peer
        return True

    def _reply(self, routing_id: bytes, head: bytes) -> None:
        sent = asyncio.ensure_future(self._socket.send_multipart([routing_id, head], flags=zmq.DONTWAIT))
        with contextlib.suppress(zmq.ZMQError):  # it left already
            sent.result()

    def _lose(self, peer: str) -> None:
        self._forget(peer)
        if self.on_peer_lost is not None:
            self.on_peer_lost(peer)

    def _forget(self, peer: str) -> _Window | None:
        window = self._receivers.pop(peer, None)
        if window is not None:
            del self._peer_of[window.routing_id]
            window.lose()
        return window


class _Window:
    """Credit of one receiver: at most `WINDOW` slices that it has neither landed nor discarded."""

    def __init__(self, routing_id: bytes) -> None:
        self.routing_id = routing_id
        self.is_lost = False
        self._free = asyncio.Semaphore(WINDOW)
        self._num_taken = 0
        self._is_probed = False

    def may_probe(self) -> bool:
        """True the first time."""
        was, self._is_probed = self._is_probed, True
        return not was

    async def take(self) -> None:
        """Wait for credit. Raises `PeerLost`."""
        await self._free.acquire()
        if self.is_lost:
            self._free.release()  # wakes the next, which waits in vain
            raise PeerLost("the decode worker is gone")
        self._num_taken += 1

    def give(self, num_slices: int) -> None:
        """Return credit; never more than was taken, whatever the receiver claims."""
        for _ in range(min(num_slices, self._num_taken)):
            self._num_taken -= 1
            self._free.release()

    def lose(self) -> None:
        self.is_lost = True
        self._free.release()
