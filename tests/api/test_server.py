from __future__ import annotations

import asyncio
import signal
import socket

import aiohttp
import pytest
from starlette.types import Receive, Scope, Send
from support.event_loop import within

from disagg.api.http.edge import Edge
from disagg.api.http.server import serve

pytestmark = pytest.mark.anyio


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/slow":
        await asyncio.Event().wait()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def get(url: str) -> bytes:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.read()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
async def test_port_zero_takes_a_free_port_and_says_which(host: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            pytest.skip(f"no {host} on this machine")
    async with serve(hello, host, 0) as listener:
        assert listener.port > 0
        assert await get(listener.url) == b"hello"


async def test_a_busy_port_is_an_oserror_that_names_it() -> None:
    async with serve(hello, "127.0.0.1", 0) as listener:
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{listener.port}: the port is in use"):
            async with serve(hello, "127.0.0.1", listener.port):
                raise AssertionError("bound twice")


async def test_an_unknown_host_is_an_oserror_that_names_it() -> None:
    with pytest.raises(OSError, match="no-such-host"):
        async with serve(hello, "no-such-host.invalid", 0):
            raise AssertionError("bound")


async def test_signals_stay_with_the_process() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with serve(hello, "127.0.0.1", 0):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


async def test_the_port_is_free_again_after_the_end() -> None:
    async with serve(hello, "127.0.0.1", 0) as listener:
        await get(listener.url)
    async with serve(hello, "127.0.0.1", listener.port) as again:
        assert await get(again.url) == b"hello"


async def test_running_requests_get_their_time_and_then_an_error() -> None:
    is_here = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        is_here.set()
        await hello(scope, receive, send)

    async with serve(Edge(app), "127.0.0.1", 0, shutdown_timeout_s=1) as listener:
        slow = asyncio.create_task(get(f"{listener.url}/slow"))
        await within(is_here.wait())
    assert b"shutting down" in await within(slow)


async def test_an_error_in_the_context_comes_out_as_itself() -> None:
    with pytest.raises(KeyError):
        async with serve(hello, "127.0.0.1", 0):
            raise KeyError("mine")
