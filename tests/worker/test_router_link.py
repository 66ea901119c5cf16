"""A worker's registration over a real socket: versions that differ, and what no frame can carry."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgpack
import pytest
from support.cluster.router_harness import GEOMETRY, IDENTITY, make_register
from support.event_loop import PATIENCE_S, in_event_loop, within
from support.links.unchecked import raw

from disagg.transceiver.wire.codec import PROTOCOL, encode
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages import router as r
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.messages.values import TokenLogprobs, UnitName
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.sockets import Sockets
from disagg.worker.router_link import RegistrationRefused, RouterLink, RouterLost

KEYS = ClusterKeys.published()
OTHER = PROTOCOL[0] + 1
ROUTER, ME = "r" * 32, "w" * 32


@dataclass
class FakeRouter:
    server: ControlServer
    route: bytes = b""

    async def hear(self) -> Any:
        """The next message that is no lease."""
        async with asyncio.timeout(PATIENCE_S):
            while isinstance(heard := await self._next(), r.Lease):
                pass
        return heard

    async def _next(self) -> Any:
        self.route, message = await self.server.recv()
        return message

    async def say(self, data: bytes) -> None:
        await self.server._socket.send_multipart([self.route, data])

    async def register(self, version: tuple[int, int] = PROTOCOL) -> None:
        """Answer REGISTER as a router of that version would."""
        assert isinstance(await self.hear(), r.Register)
        _, _, tag, fields = msgpack.unpackb(encode(r.Registered(ROUTER, ME)))
        await self.say(msgpack.packb([*version, tag, fields | {"added": 1}]))


@contextlib.asynccontextmanager
async def a_router() -> AsyncIterator[FakeRouter]:
    server = ControlServer.bind("tcp://127.0.0.1:0", KEYS)
    try:
        yield FakeRouter(server)
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def registered(router: FakeRouter, version: tuple[int, int] = PROTOCOL) -> AsyncIterator[RouterLink]:
    """A worker's link to a router that answers in this version of the protocol."""
    sockets = Sockets(KEYS)
    node = Node(ME, "worker", IDENTITY, GEOMETRY, KEYS)
    answering = asyncio.create_task(router.register(version))
    opened = RouterLink.open(
        router.server.endpoint,
        node,
        sockets,
        make_register("worker", "decode", incarnation=ME),
        lambda incarnation: r.Lease(ME, incarnation),
    )
    try:
        async with opened as link:
            yield link
    finally:
        await answering
        sockets.close()


@contextlib.asynccontextmanager
async def kept(router: FakeRouter) -> AsyncIterator[RouterLink]:
    async with registered(router) as link:
        keeping = asyncio.create_task(link.keep())
        try:
            yield link
            assert not keeping.done(), keeping.exception()
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)


UNSENDABLE = {
    "tokens": (raw(Tokens, "t", 1, 0, (2**70,)), r.RequestFailed),
    "logprobs": (Tokens("t", 1, 0, (1,), (raw(TokenLogprobs, 0.0, ((2**70, 0.0),)),)), r.RequestFailed),
    "the end": (raw(r.Finished, "t", 1, 2**70, "stop"), r.RequestFailed),
    "a failure": (r.RequestFailed("t", 1, 503, "no room for \udc80"), r.RequestFailed),
    "a long failure": (raw(r.TransferFailure, "t", 1, "x" * (17 << 20)), r.TransferFailure),
    "many units": (r.TransferFailure("t", 1, "digest", (raw(UnitName, 2**70, 1),)), r.TransferFailure),
}


@pytest.mark.parametrize("name", UNSENDABLE)
@in_event_loop
async def test_what_no_frame_can_carry_ends_its_own_attempt_and_the_worker_goes_on(name: str) -> None:
    message, kind = UNSENDABLE[name]
    async with a_router() as router, kept(router) as link:
        link.send(message)
        link.send(r.Finished("other", 1, 3, "length"))
        instead = await router.hear()
        assert type(instead) is kind
        assert (instead.transfer_id, instead.epoch) == ("t", 1)
        assert "cannot" in (instead.reason if isinstance(instead, r.TransferFailure) else instead.message)
        assert getattr(instead, "status", 500) == getattr(message, "status", 500)
        assert await router.hear() == r.Finished("other", 1, 3, "length")


@in_event_loop
async def test_a_report_that_no_frame_can_carry_is_left_out() -> None:
    async with a_router() as router, kept(router) as link:
        link.send(r.RequestFailed("t", 1, 503, "first"))
        link.send(raw(r.CancelRequest, "t", 2**70, ""))
        link.send(r.RequestFailed("t", 1, 503, "last"))
        assert [(await router.hear()).message for _ in range(2)] == ["first", "last"]


@in_event_loop
async def test_a_router_of_another_major_refuses_this_worker_naming_both() -> None:
    async with a_router() as router:
        with pytest.raises(RegistrationRefused) as refused:
            async with registered(router, (OTHER, 4)):
                pass
    assert f"protocol: it has {OTHER}.4, this worker {PROTOCOL[0]}.{PROTOCOL[1]}" in str(refused.value)


@in_event_loop
async def test_a_router_of_a_later_minor_registers_this_worker() -> None:
    async with a_router() as router, registered(router, (PROTOCOL[0], PROTOCOL[1] + 1)) as link:
        assert link.router_incarnation == ROUTER


@in_event_loop
async def test_a_registered_worker_that_hears_another_major_registers_anew() -> None:
    async with a_router() as router, registered(router) as link:
        await router.say(msgpack.packb([OTHER, 0, 35, {}]))
        with pytest.raises(RouterLost, match=f"protocol {OTHER}.0"):
            await within(link.next_message())
