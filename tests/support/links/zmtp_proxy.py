"""A TCP proxy that reads ZMTP 3 frames as they pass from server to client. Shares no code with the zmq plane."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

GREETING_NBYTES = 64
MORE, LONG, COMMAND = 1, 2, 4
CHUNK_NBYTES = 1 << 16


@dataclass(frozen=True)
class Frame:
    """`index` counts the frames of one message from 0. Under CURVE every frame is one box and index 0."""

    index: int
    nbytes: int
    is_command: bool


class ZmtpProxy:
    """Relays connections to `target`. Subclasses see, and may change, the body of each frame that the server sends."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        assert parts.hostname
        assert parts.port
        self._target = parts.hostname, parts.port
        self.endpoint = ""

    def pass_on(self, frame: Frame, offset: int, chunk: bytes) -> bytes:
        """What to send instead of `chunk`, which lies at `offset` of the frame's body: here, itself."""
        return chunk

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = "tcp://{}:{}".format(*server.sockets[0].getsockname())
        self._relays: set[asyncio.Task[None]] = set()
        try:
            yield
        finally:
            server.close()
            for relay in self._relays:
                relay.cancel()
            await asyncio.gather(*self._relays, return_exceptions=True)

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        try:
            from_server, to_server = await asyncio.open_connection(*self._target)
            try:
                await self._relay_both(from_client, to_server, from_server, to_client)
            finally:
                to_server.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one side ended: so does the other
        finally:
            to_client.close()
            self._relays.discard(task)

    async def _relay_both(
        self,
        from_client: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
    ) -> None:
        relays = {
            asyncio.ensure_future(self._relay_bytes(from_client, to_server)),
            asyncio.ensure_future(self._relay_frames(from_server, to_client)),
        }
        try:
            await asyncio.wait(relays, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for relay in relays:
                relay.cancel()
            await asyncio.gather(*relays, return_exceptions=True)

    async def _relay_bytes(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while chunk := await source.read(CHUNK_NBYTES):
            to.write(chunk)
            await to.drain()

    async def _relay_frames(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        await self._relay_greeting(source, to)
        index = 0
        while True:
            flags = (await source.readexactly(1))[0]
            length = await source.readexactly(8 if flags & LONG else 1)
            to.write(bytes([flags]) + length)
            frame = Frame(index, int.from_bytes(length, "big"), bool(flags & COMMAND))
            await self._relay_body(frame, source, to)
            if not frame.is_command:
                index = index + 1 if flags & MORE else 0

    async def _relay_greeting(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        """In the pieces it comes in: each side sends the second half after it has seen the first of the other."""
        left = GREETING_NBYTES
        while left:
            piece = await source.read(left)
            if not piece:
                raise asyncio.IncompleteReadError(piece, left)
            to.write(piece)
            left -= len(piece)

    async def _relay_body(self, frame: Frame, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        offset = 0
        while offset < frame.nbytes:
            chunk = await source.readexactly(min(CHUNK_NBYTES, frame.nbytes - offset))
            to.write(self.pass_on(frame, offset, chunk))
            await to.drain()
            offset += len(chunk)
        await to.drain()
