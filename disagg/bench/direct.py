"""A worker's own HTTP stream, as small as it can be: one event per step to every client. The floor for a proxy.

The body of a request is read and answered with as many events as its `max_tokens`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text: str, reason: str | None = None) -> bytes:
    """An event of `/v1/completions` as the router writes it."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
    value = {
        "id": "cmpl-0123456789abcdef0123456789abcdef",
        "object": "text_completion",
        "created": 1700000000,
        "model": "demo",
        "choices": [choice],
    }
    return chunk(b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n")


@asynccontextmanager
async def serve_directly(step_s: float) -> AsyncIterator[int]:
    """Serve on a free port of the loopback, which it yields."""
    running: dict[asyncio.StreamWriter, int] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
                body = json.loads(await reader.readexactly(int(length.split(b":")[1])))
                writer.write(HEAD)
                running[writer] = body["max_tokens"]
        running.pop(writer, None)
        writer.close()

    async def step_on() -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + step_s, loop.time())
            await asyncio.sleep(due - loop.time())
            for writer, left in list(running.items()):
                writer.write(event(" word"))
                running[writer] = left - 1
                if left == 1:
                    writer.write(event("", "length") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
                    del running[writer]

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    stepping = asyncio.create_task(step_on())
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        stepping.cancel()
        server.close()
