"""Connections and the bounds on them, over real sockets: refusals arrive, silent clients end, others go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from support.cluster.fake_backend import FakeBackend
from support.model.small_tokenizers import DEMO_FOLDER

from disagg.api.app import open_app
from disagg.api.http import connection
from disagg.api.http.connections import Connections
from disagg.api.http.h11_connection import MAX_EVENTS, MAX_HEAD_LINES
from disagg.api.http.server import Listener, serve
from disagg.api.settings import ApiSettings

pytestmark = pytest.mark.anyio

BODY = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


class Server:
    def __init__(self, listener: Listener, backend: FakeBackend, book: Connections) -> None:
        self.listener, self.backend, self.book = listener, backend, book
        self.clients: list[Client] = []

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection(self.listener.host, self.listener.port))
        self.clients.append(client)
        return client

    async def close(self) -> None:
        for client in self.clients:
            client.writer.transport.abort()
        for client in self.clients:
            with contextlib.suppress(OSError):
                await client.writer.wait_closed()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.book) != count:  # noqa: ASYNC110 - the product has no event for it
                await asyncio.sleep(0.01)
        self.book.check_invariants()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, data: bytes = REQUEST) -> int:
        self.writer.write(data)
        return await self.status()

    async def status(self) -> int:
        """The status of the next response, whose body is read too; 0 when the connection ends instead."""
        try:
            async with asyncio.timeout(10):
                head = await self.reader.readuntil(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                await self.reader.readexactly(int(fields.get(b"content-length", b"0")))
                if fields.get(b"transfer-encoding") == b"chunked":
                    await self.reader.readuntil(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0
        return int(head.split()[1])

    async def is_closed(self, timeout_s: float = 10) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                return not await self.reader.read(1)
        except ConnectionError:
            return True
        except TimeoutError:
            return False


@contextlib.asynccontextmanager
async def running(bound: int = 100, **settings: Any) -> AsyncIterator[Server]:
    backend, book = FakeBackend(), Connections(bound)
    told = ApiSettings(model_folder=DEMO_FOLDER, served_model_name="demo", **settings)
    async with (
        open_app(backend, told) as app,
        serve(app, "127.0.0.1", 0, shutdown_timeout_s=1, connections=book) as listener,
    ):
        server = Server(listener, backend, book)
        try:
            yield server
        finally:
            await server.close()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with running(api_keys={"key": "t"}) as server:
        yield server


def urllib_status(url: str, body: bytes, headers: dict[str, str]) -> int | str:
    """urllib sends the whole body before it looks for an answer, and closes after each request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        return type(error.reason).__name__


KEY = {"Authorization": "bearer key"}
REFUSED = [
    (413, "/v1/completions", KEY, 9_000_000),
    (404, "/v1/nothing", KEY, 5_000_000),
    (405, "/v1/models", KEY, 5_000_000),
    (400, "/v1/completions", {**KEY, "X-Request-Id": "x" * 200}, 5_000_000),
    (401, "/v1/completions", {"Authorization": "Bearer wrong"}, 5_000_000),
    (401, "/v1/completions", {}, 100_000),
    (431, "/v1/completions", {f"X-{i}": "x" for i in range(2 * MAX_HEAD_LINES)}, 5_000_000),
]


@pytest.mark.parametrize(("status", "path", "headers", "nbytes"), REFUSED)
async def test_a_refusal_reaches_a_client_that_still_sends(
    server: Server, status: int, path: str, headers: dict[str, str], nbytes: int
) -> None:
    for _ in range(3):
        assert await asyncio.to_thread(urllib_status, server.listener.url + path, b"a" * nbytes, headers) == status


async def test_a_refusal_is_lost_if_the_connection_is_closed_at_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control for the test above."""
    monkeypatch.setattr(connection.HttpConnection, "may_be_sending", False)
    url = server.listener.url + "/v1/nothing"
    seen = {await asyncio.to_thread(urllib_status, url, b"a" * 5_000_000, KEY) for _ in range(5)}
    assert seen & {"ConnectionResetError", "BrokenPipeError"}


async def test_a_small_refused_body_leaves_the_connection_usable(server: Server) -> None:
    client = await server.connect()
    refused = b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Length: 100000\r\n\r\n"
    assert await client.ask(refused + b"x" * 100_000) == 404
    assert await client.ask(REQUEST.replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer key")) == 200


async def test_a_client_that_waits_for_leave_to_send_is_refused_without_it(server: Server) -> None:
    client = await server.connect()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-Continue\r\nContent-Length: 9000000\r\n\r\n"
    assert await client.ask(head) == 401
    assert await client.is_closed(1)


async def test_a_client_that_is_let_send_is_told_so() -> None:
    async with running() as server:
        client = await server.connect()
        head, _, body = REQUEST.partition(b"\r\n\r\n")
        assert await client.ask(head + b"\r\nExpect: 100-Continue\r\n\r\n") == 100
        assert await client.ask(body) == 200


async def send_chunks(client: Client, count: int) -> None:
    for _ in range(count):
        client.writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        await client.writer.drain()


@pytest.mark.parametrize("value", [b"close", b"Close", b"foo, CLOSE", b" close "])
async def test_a_client_that_asks_for_the_end_gets_it_in_any_case(value: bytes) -> None:
    async with running() as server:
        client = await server.connect()
        assert await client.ask(REQUEST.replace(b"Host: x", b"Host: x\r\nConnection:" + value)) == 200
        assert await client.is_closed(1)


@pytest.mark.parametrize("value", [b"application/json", b"Application/JSON; Charset=UTF-8", b"text/plain", b""])
async def test_the_type_of_a_body_is_not_asked_for(value: bytes) -> None:
    """vLLM and OpenAI take JSON whatever it is called; curl calls it a form."""
    async with running() as server:
        client = await server.connect()
        assert await client.ask(REQUEST.replace(b"Host: x", b"Host: x\r\nContent-Type: " + value)) == 200


async def test_spaces_around_a_header_mean_nothing(server: Server) -> None:
    client = await server.connect()
    named = REQUEST.replace(b"Host: x", b"Host: x\r\nAuthorization: \t Bearer  key \r\nX-Request-Id:   mine \t")
    assert await client.ask(named) == 200
    assert server.backend.requests[-1].request_id == "mine"


async def test_a_client_that_never_stops_sending_is_cut(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_NBYTES", 1_000_000)
    client = await server.connect()
    client.writer.write(b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n")
    with pytest.raises(ConnectionError):
        await send_chunks(client, 2000)  # 128 MiB, of which nothing is wanted
    await server.until(0)


async def test_a_client_that_is_refused_and_stays_is_closed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_QUIET_S", 0.1)
    client = await server.connect()
    head = b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n"
    assert await client.ask(head + b"some of it") == 401
    await server.until(0)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost"])
async def test_a_client_that_sends_no_whole_head_is_closed(
    server: Server, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.3)
    client = await server.connect()
    client.writer.write(sent)
    assert await client.is_closed()
    await server.until(0)


async def test_a_head_that_is_dribbled_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.5)
    for first in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):  # as the first request or as a later one
        client = await server.connect()
        if first:
            assert await client.ask(first) == 200
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                client.writer.write(b"x")
                await client.writer.drain()
                await asyncio.sleep(0.1)
        assert await client.is_closed(1)


async def test_a_client_that_reads_nothing_is_cut(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALL_TIMEOUT_S", 0.3)
    client = await server.connect()
    client.writer.transport.pause_reading()
    ask = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    server.backend.metrics = lambda: bytes(8_000_000)  # type: ignore[method-assign]
    client.writer.write(ask)
    await server.until(1)
    await server.until(0)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_is_not_http_is_400_or_the_end(server: Server, garbage: bytes) -> None:
    client = await server.connect()
    assert await client.ask(garbage) in (400, 401)
    client.writer.close()
    await server.until(0)


async def test_garbage_in_the_middle_of_a_body_ends_that_request_only(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as server:
        client, other = await server.connect(), await server.connect()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        client.writer.write(head)
        await asyncio.sleep(0.1)
        assert await client.ask(b"not hexadecimal\r\n") == 400
        assert await other.ask() == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_body_of_tiny_chunks_is_taken_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    look = connection.HttpConnection.handle_events

    def counted(self: connection.HttpConnection) -> None:
        turns.append(len(turns))
        look(self)

    monkeypatch.setattr(connection.HttpConnection, "handle_events", counted)
    async with running() as server:
        body = b" " * 20_000 + BODY
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\ntransfer-encoding: CHUNKED\r\n\r\n"
        client = await server.connect()
        assert await client.ask(head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n") == 200
        assert len(turns) > len(body) / MAX_EVENTS
        assert await client.ask() == 200


async def test_a_new_client_takes_the_place_of_the_oldest_silent_one() -> None:
    async with running(bound=3) as server:
        served = await server.connect()
        assert await served.ask() == 200
        silent = [await server.connect() for _ in range(20)]
        assert await served.ask() == 200
        assert await silent[0].is_closed()
        assert await silent[-1].ask() == 200
        assert not await silent[-2].is_closed(0.1)
        await server.until(3)


async def test_a_served_client_that_idles_gives_way_before_one_that_is_served() -> None:
    async with running(bound=2) as server:
        gate = asyncio.Event()
        server.backend.script = lambda request: [gate, *FakeBackend().script(request)]
        busy = await server.connect()
        busy.writer.write(REQUEST)
        await server.backend.until(lambda: server.backend.num_open == 1)
        server.backend.script = FakeBackend().script
        idle = await server.connect()
        assert await idle.ask() == 200
        new = await server.connect()
        assert await new.ask() == 200
        assert await idle.is_closed()
        gate.set()
        assert await busy.status() == 200


async def test_where_every_client_has_a_running_request_a_new_one_is_told_to_come_back() -> None:
    async with running(bound=2) as server:
        gate = asyncio.Event()
        server.backend.script = lambda request: [gate, *FakeBackend().script(request)]
        busy = [await server.connect() for _ in range(2)]
        for client in busy:
            client.writer.write(REQUEST)
        await server.backend.until(lambda: server.backend.num_open == 2)
        new = await server.connect()
        assert await new.ask() == 503
        gate.set()
        assert [await client.status() for client in busy] == [200, 200]


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """No descriptor is left after a few more."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as taken:  # numbers further on may be in use already
        free = [taken.enter_context(socket.socket()).fileno() for _ in range(60)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_running_out_of_descriptors_closes_silent_clients_and_logs_once(
    few_descriptors: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(bound=1000) as server:
        served = await server.connect()
        assert await served.ask() == 200
        silent = []
        with contextlib.suppress(OSError):  # both ends are in this process
            while True:
                silent.append(await server.connect())
        for client in silent[:8]:
            client.writer.close()
        for _ in range(4):
            assert await served.ask() == 200
        seen = {await (await server.connect()).ask() for _ in range(5)}
        assert 200 in seen
    assert len([record for record in caplog.records if "accepted" in record.message]) <= 1
