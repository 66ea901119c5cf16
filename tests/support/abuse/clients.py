"""Clients that take a connection and make nothing of it: silent, slow to say, slow to read. All on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from support.abuse.pair import Door

BATCH = 100  # connections begun together, fewer than a listener's backlog holds
CONNECT_TIMEOUT_S = 3.0
DRIP_S = 0.5
SMALL_NBYTES = 4096  # of a receive buffer: an answer that nobody reads soon fills it
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
LONG_ANSWER = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 20}

Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Until the server hangs up."""
    await reader.read()


async def slow_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await _drip(writer, HEAD + b"X-Long: " + b"x" * 4096)


async def slow_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD + b"Content-Length: 100000\r\n\r\n")
    await _drip(writer, b'{"prompt": "' + b"x" * 4096)


async def kept_alive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request that is answered, and then nothing."""
    writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    await reader.read()


async def never_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_request(LONG_ANSWER))
    writer.transport.pause_reading()
    await asyncio.Event().wait()


async def slow_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(_request(LONG_ANSWER))
    writer.transport.pause_reading()
    while True:
        await asyncio.sleep(DRIP_S)
        writer.transport.resume_reading()
        await reader.read(16)
        writer.transport.pause_reading()


SILENT_KINDS: tuple[Client, ...] = (silent, slow_headers, slow_body, kept_alive)
READING_KINDS: tuple[Client, ...] = (never_reads, slow_reads)
"""Each takes a seat of the pair's, so there are few of them."""


def _request(body: dict[str, object]) -> bytes:
    data = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data


async def _drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    for byte in data:
        writer.write(bytes([byte]))
        await asyncio.sleep(DRIP_S)


@dataclass
class Crowd:
    """Connections held open, by kind, and how many of them the server closed again."""

    num_open: Counter[str] = field(default_factory=Counter)
    num_refused: int = 0
    num_closed: int = 0

    @property
    def num_connected(self) -> int:
        return self.num_open.total()

    def __str__(self) -> str:
        kinds = dict(sorted(self.num_open.items()))
        return f"{kinds}, of them {self.num_closed} closed by the server, {self.num_refused} more not accepted"


@contextlib.asynccontextmanager
async def crowd(door: Door, kinds: tuple[Client, ...], num_clients: int) -> AsyncIterator[Crowd]:
    """So many clients at one door, kinds in turn, for as long as the block runs."""
    made, tasks = Crowd(), set[asyncio.Task[None]]()
    try:
        for start in range(0, num_clients, BATCH):
            batch = range(start, min(start + BATCH, num_clients))
            begun = [asyncio.create_task(_connect(door)) for _ in batch]
            for number, connection in zip(batch, await asyncio.gather(*begun), strict=True):
                if connection is None:
                    made.num_refused += 1
                    continue
                kind = kinds[number % len(kinds)]
                made.num_open[kind.__name__] += 1
                tasks.add(asyncio.create_task(_stay(kind, *connection, made)))
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _connect(door: Door) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    made = socket.socket(door.family)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_NBYTES)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await asyncio.get_running_loop().sock_connect(made, door.address)
            return await asyncio.open_connection(sock=made)
    except OSError:  # TimeoutError is one
        made.close()
        return None


async def _stay(kind: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, crowd: Crowd) -> None:
    try:
        await kind(reader, writer)
        crowd.num_closed += 1
    except OSError:
        crowd.num_closed += 1
    finally:
        writer.transport.abort()


@dataclass
class Newcomers:
    """Clients that come while the crowd is there, ask once and leave."""

    num_answered: int = 0
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0


async def newcomers(door: Door, seconds: float, *, every_s: float = 0.5, timeout_s: float = 5.0) -> Newcomers:
    """One after the other; each must be answered, crowd or not."""
    seen, until = Newcomers(), time.monotonic() + seconds
    while time.monotonic() < until:
        began_at = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await _ask_once(door)
            seen.num_answered += 1
        except (OSError, ValueError) as error:
            seen.faults.append(f"a newcomer at {door.owner} {door.address}: {error!r}")
        seen.longest_s = max(seen.longest_s, time.monotonic() - began_at)
        await asyncio.sleep(every_s)
    return seen


async def _ask_once(door: Door) -> None:
    assert isinstance(door.address, tuple)
    reader, writer = await asyncio.open_connection(*door.address)
    try:
        writer.write(b"GET /workers HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = await reader.read(64)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ValueError(f"answered {answer[:60]!r}")
        while await reader.read(65536):
            pass
    finally:
        writer.close()
