"""One registration of one worker: from an incarnation's REGISTER to the loss of the router or the end of the process.

Everything that belongs to an incarnation (peers, planes, tickets, requests) lives here and goes with it; the engine,
its pools and the landing threads outlive it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence
from functools import partial

from disagg.engine.commands import AttemptKey, Release
from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.peers.decode_side import ReceivingSide
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.wire.errors import clipped
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.blocks import AskBlocks
from disagg.transceiver.wire.messages.ranges import MAX_LEASED, MAX_SAMPLES
from disagg.transceiver.wire.messages.router import (
    DRAINING,
    READY,
    Dispatch,
    Lease,
    PrefillLocally,
    Register,
    Retarget,
    RouterMessage,
)
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.purposes import PREFIX
from disagg.transceiver.wire.timing import HEARTBEAT_S
from disagg.worker.attempts import Attempts
from disagg.worker.block_news import BlockNews
from disagg.worker.engine_events import EngineEvents
from disagg.worker.in_turn import InTurn
from disagg.worker.model_thread import Call
from disagg.worker.pairing import Pairing
from disagg.worker.parts import WorkerParts
from disagg.worker.plane_classes import landing_planes, source_planes
from disagg.worker.prefix_sinks import PrefixSinks
from disagg.worker.prefix_sources import PrefixSources
from disagg.worker.router_link import RouterLink, RouterLost

log = logging.getLogger(__name__)


class Registration:
    """Serves one incarnation. `run` ends by `RouterLost`, `RegistrationRefused` or cancellation, with nothing held."""

    def __init__(self, parts: WorkerParts, node: Node) -> None:
        self._parts, self._node = parts, node
        self._attempts: Attempts
        self._events: EngineEvents
        self._blocks: BlockNews | None = None
        self._in_turn = InTurn(MAX_LEASED)

    async def run(self) -> None:
        """Register, then serve."""
        async with contextlib.AsyncExitStack() as stack:
            server, planes = await self._listen(stack)
            register = self._make_register(server)
            link = await stack.enter_async_context(
                RouterLink.open(
                    self._parts.settings.router,
                    self._node,
                    self._parts.sockets,
                    register,
                    self._make_lease,
                    self._parts.vitals,
                    self._parts.model.hold,
                )
            )
            self._attempts = self._make_attempts(link, planes)
            self._events = EngineEvents(self._parts, self._attempts)
            self._attach_sides(server, planes)
            self._blocks = self._make_block_news(link)
            self._parts.announce_ready()
            try:
                with self._parts.drain.serving(lambda: self._attempts.num_open):
                    await self._serve(link)
            finally:
                await self._release_all()

    async def _serve(self, link: RouterLink) -> None:
        async with asyncio.TaskGroup() as tasks:
            if self._attempts.sending is not None:
                tasks.create_task(self._attempts.sending.run())
            if self._attempts.receiving is not None:
                tasks.create_task(self._attempts.receiving.run())
            tasks.create_task(link.keep())
            tasks.create_task(self._take_messages(link))
            tasks.create_task(self._events.run())
            tasks.create_task(self._look_at_deadlines())
            if self._blocks is not None:
                tasks.create_task(self._blocks.run())
            tasks.create_task(self._parts.drain.run(link.renew, link.flushed))

    async def _take_messages(self, link: RouterLink) -> None:
        while True:
            message = await link.next_message()
            try:
                self._take(message)
            except (
                Exception
            ) as fault:  # whatever the router's message brings about here costs the router, not the process
                self._contain(link, message, fault)

    def _take(self, message: RouterMessage) -> None:
        if isinstance(message, AskBlocks):
            if self._blocks is not None:
                self._blocks.ask(message)
        else:
            self._attempts.take_message(message)

    def _contain(self, link: RouterLink, message: RouterMessage, fault: Exception) -> None:
        """End the attempt that the message is about; without one, this registration."""
        kind = type(message).__name__
        log.error("a %s of the router cannot be taken: %s", kind, clipped(repr(fault)), exc_info=fault)
        if not isinstance(message, Dispatch | Retarget | PrefillLocally):
            raise RouterLost(f"its {kind} cannot be taken: {clipped(repr(fault))}") from fault
        self._attempts.fail(AttemptKey(message.transfer_id, message.epoch), f"a fault of this worker: {kind}")

    async def _look_at_deadlines(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._attempts.look_at_deadlines()

    async def _listen(self, stack: contextlib.AsyncExitStack) -> tuple[ControlServer | None, dict[str, SourcePlane]]:
        """A source of anything answers peers and serves planes; the others only connect."""
        parts = self._parts
        if not self._node.sends:
            return None, {}
        server = ControlServer.bind(f"tcp://{parts.settings.host}:0", self._node.keys, parts.sockets)
        stack.push_async_callback(server.close)
        settings = parts.settings
        planes = source_planes(
            settings.planes,
            host=settings.host,
            advertised_host=settings.peer_host,
            keys=self._node.keys,
            sockets=parts.sockets,
        )
        for plane in planes.values():
            stack.push_async_callback(plane.close)
            await plane.start(parts.regions)
        return server, planes

    def _attach_sides(self, server: ControlServer | None, planes: dict[str, SourcePlane]) -> None:
        parts = self._parts
        if server is not None:
            self._attempts.sending = SendingSide(
                self._node,
                server,
                planes,
                self._attempts,
                parts.regions,
                parts.faults,
                parts.metrics.count_refused,
            )
        if self._node.receives:
            self._attempts.receiving = ReceivingSide(
                self._node,
                landing_planes(parts.settings.planes, keys=self._node.keys, sockets=parts.sockets),
                parts.regions,
                parts.layout.pool_of_group,
                parts.landing,
                parts.sockets,
                self._attempts,
                faults=parts.faults,
                on_landed=self._keep_landed,
                on_room=self._attempts.make_room,
            )
            parts.metrics.watch_links(self._attempts.receiving.speeds)
        if self._attempts.sources is not None and self._attempts.sending is not None:
            self._attempts.sources.sending = self._attempts.sending
        if self._attempts.sinks is not None:
            self._attempts.sinks.receiving = self._attempts.receiving

    def _keep_landed(self, key: AttemptKey, units: Sequence[HashedUnit]) -> None:
        """What was verified needs no second hash to be lent. A last block in part is filled here, and hashed then."""
        num_tokens = self._attempts.num_known(key)
        if num_tokens is not None:
            units = [unit for unit in units if unit.ordinal < num_tokens // self._parts.layout.block_size]
        self._parts.cuts.kept.keep_landed(units)

    def _make_attempts(self, link: RouterLink, planes: dict[str, SourcePlane]) -> Attempts:
        parts, taking_in = self._parts, self._parts.taking_in
        pushes = {name: plane.sends_bytes for name, plane in planes.items()}
        pair = partial(Pairing, self._node, parts.layout, pushes)
        hasher = parts.made.hasher
        rates = lambda: parts.model.speeds.rates  # noqa: E731
        sinks = PrefixSinks(
            pair, taking_in.submit, link.send, parts.metrics, hasher=hasher, rates=rates, take_in=taking_in.decode
        )
        attempts = Attempts(
            sinks.submit,
            link.send,
            pair,
            parts.metrics,
            fetch_wait_s=parts.settings.fetch_wait_s,
            decode=taking_in.decode,
            on_pressed=link.renew,
            lacks_floor=lambda: parts.model.stats.num_reserved > 0 and not parts.model.stats.has_floor,
        )
        attempts.sinks = sinks
        if hasher is not None and PREFIX in self._node.sends:
            size, count = parts.layout.block_size, parts.metrics.count_digest_failure
            attempts.sources = PrefixSources(pair, hasher, size, taking_in.submit, count)
        return attempts

    def _make_block_news(self, link: RouterLink) -> BlockNews | None:
        parts, journal = self._parts, self._parts.made.cache.journal
        if journal is None:
            return None
        submit = parts.model.submit
        block_size = parts.layout.block_size
        return BlockNews(journal, self._node.incarnation, block_size, link.send, lambda call: submit(Call(call)))

    def _make_register(self, server: ControlServer | None) -> Register:
        node, parts = self._node, self._parts
        port = server.endpoint.rsplit(":", 1)[1] if server is not None else ""
        return Register(
            incarnation=node.incarnation,
            worker_id=node.worker_id,
            role=parts.role,
            identity=node.identity,
            geometry=node.geometry,
            planes=tuple(parts.settings.planes),
            peer_endpoint=f"tcp://{parts.settings.peer_host}:{port}" if server is not None else "",
            pid=os.getpid(),
            host=socket.gethostname(),
            device=parts.settings.device,
            num_slots=parts.num_slots,
            sends=node.sends,
            receives=node.receives,
            tells_blocks=parts.made.cache.journal is not None,
        )

    def _make_lease(self, router_incarnation: str) -> Lease:
        stats = self._parts.model.stats
        return Lease(
            incarnation=self._node.incarnation,
            router_incarnation=router_incarnation,
            state=DRAINING if self._parts.drain.asked.is_set() else READY,
            metrics=self._parts.metrics.samples(stats)[:MAX_SAMPLES],
            requests=self._in_turn.some([(key.transfer_id, key.epoch) for key in self._attempts.keys]),
            num_running=stats.num_running,
            num_queued=stats.num_waiting,
            blocks_used=tuple(pool.num_used for pool in stats.pools),
            blocks_free=tuple(pool.num_free for pool in stats.pools),
            links=self._attempts.receiving.reports() if self._attempts.receiving is not None else (),
            rates=self._parts.model.speeds.rates,
            pressed=self._attempts.take_pressed()[:MAX_LEASED],
        )

    async def _release_all(self) -> None:
        """The registration is over, and so are its requests. Landing jobs end before their slots are freed."""
        receiving = self._attempts.receiving
        if self._attempts.sinks is not None:
            self._attempts.sinks.close()
        granted = tuple(self._attempts.sources) if self._attempts.sources is not None else ()
        # A cancelled attempt is forgotten at once, while its landing jobs may still be joined. All of them are before
        # anything is released: what lands for a prompt has a name of its own.
        keys = {*self._attempts.held, *(receiving.held if receiving is not None else ()), *granted}
        for key in keys:
            await self._parts.landing.stop(key.transfer_id, key.epoch)
        for key in keys:
            self._parts.taking_in.submit(Release(key))
