"""HTTP, router and a worker in one process: a client that reads nothing slows its own answer, and no other."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from support.event_loop import in_event_loop, within

from disagg.api.app import open_app
from disagg.api.http.server import bind, serve_on
from disagg.api.settings import ApiSettings
from disagg.bench import streams
from disagg.bench.fleet import KEYS, FakeFleet
from disagg.config.demo import demo_model_folder
from disagg.router.router import Router

pytestmark = pytest.mark.processes

SMALL_NBYTES = 16 * 1024
"""Of a socket's buffers, so that a client which reads nothing stalls after some hundred tokens."""
LONG, SHORT = 5_000, 32


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[int, Router]]:
    """The port of an API over a router with one worker, which makes a token of each answer every 0.5 ms."""
    settings = ApiSettings(model_folder=demo_model_folder(), served_model_name="demo")
    async with Router.open("tcp://127.0.0.1:0", KEYS) as router, open_app(router, settings) as app:
        fleet = FakeFleet(router.endpoint, 0.0005)
        await within(fleet.register("both"), 10)
        bound = await bind("127.0.0.1", 0)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL_NBYTES)
        try:
            async with serve_on(bound, app) as listener:
                yield listener.port, router
        finally:
            await fleet.close()


async def stalled(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that asks for a long answer and reads nothing of it."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_NBYTES)
    plain.setblocking(False)
    await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=plain, limit=1 << 12)
    writer.write(streams.request("/v1/completions", 4, LONG, 1))
    return reader, writer


async def quick(port: int, count: int) -> float:
    """Seconds for as many short answers, one after another."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent, began_at = streams.request("/v1/completions", 4, SHORT, 2), asyncio.get_running_loop().time()
    for _ in range(count):
        assert not (await streams.stream(reader, writer, sent)).fault
    writer.close()
    return asyncio.get_running_loop().time() - began_at


@in_event_loop
async def test_a_client_that_reads_nothing_slows_no_other_and_gets_its_whole_answer_when_it_reads() -> None:
    async with served() as (port, router):
        alone_s = await within(quick(port, 10), 20)
        reader, writer = await stalled(port)
        beside_s = await within(quick(port, 10), 20)
        assert beside_s < 3 * alone_s + 0.5
        (slow,) = router._streams.values()  # of which the router holds what its worker made and the client has not read
        await within(_until(lambda: slow.attempts.num_tokens == LONG or slow.attempts.is_over), 20)
        data = b""
        async with asyncio.timeout(20):
            while not data.endswith(b"0\r\n\r\n"):
                data += await reader.read(1 << 16)
        assert b"data: [DONE]" in data
        assert b'"finish_reason":"length"' in data
        words = data.count(b'"text":"')
        assert words > LONG // 64, "joined, as a slow reader gets them"
        writer.close()


async def _until(is_true: object) -> None:
    while not is_true():  # type: ignore[operator]  # noqa: ASYNC110 (nothing announces it)
        await asyncio.sleep(0.01)
