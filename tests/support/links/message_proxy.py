"""A TCP proxy between two control sockets that sees each message: it holds, drops, repeats, bends, cuts and stalls.

It reads ZMTP 3 in both directions, so the keys must be insecure; the code under test knows nothing of it. Greetings,
handshake, heartbeats and multi-frame data messages pass as they are. Faults hit messages of transfers only.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.errors import RemoteProtocolError

GREETING_NBYTES = 64
MORE, LONG, COMMAND = 1, 2, 4
MIN_FLIPPED_NBYTES = 128
"""Where bytes pass as they are, less than this is no payload."""
UP, DOWN = "up", "down"
"""Client to server (decode to prefill) and back."""


@dataclass(eq=False)
class Passing:
    """One frame on its way. `message` is what it decodes to when it is a message of a transfer, else None."""

    link: _Link
    direction: str
    flags: int
    body: bytes
    message: Any

    def write(self, body: bytes | None = None) -> None:
        body = self.body if body is None else body
        length = len(body).to_bytes(8, "big")
        with contextlib.suppress(RuntimeError):  # a link that was cut meanwhile loses what was on it
            self.link.writers[self.direction].write(bytes([self.flags | LONG]) + length + body)


@dataclass(eq=False)
class _Link:
    writers: dict[str, asyncio.StreamWriter]

    def abort(self) -> None:
        for writer in self.writers.values():
            writer.transport.abort()


class MessageProxy:
    """Listens at `endpoint`, the same for its whole life; relays to `target`, which may change."""

    def __init__(self, *, delay_s: float = 0.1, seed: int = 0, is_zmtp: bool = True) -> None:
        """`is_zmtp`: else bytes pass as they are, and only cuts, stalls and flips are to be had."""
        self.endpoint = ""
        self.target = ""
        self.is_down = False
        """Refuse connections: the process behind it is dead."""
        self.hold: Callable[[str, Any], bool] | None = None
        """Messages of transfers that stay in the proxy until `release`."""
        self.rewrite: Callable[[str, Any], Any] | None = None
        """What to say instead of a message of a transfer: another message, or the same one."""
        self.flip_payload_at: int | None = None
        """Byte of the next payload (the last frame of a message of several) that is flipped, once."""
        self.num_flipped = 0
        self.history: list[Passing] = []
        self.num_fired = 0
        self.num_cut = 0
        self.num_stalled = 0
        self._delay_s, self._is_zmtp = delay_s, is_zmtp
        self._rng = random.Random(seed)
        self._fault = ""
        self._held: list[Passing] = []
        self._overtaken: list[Passing] = []
        self._links: set[_Link] = set()
        self._relays: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = "tcp://{}:{}".format(*self._server.sockets[0].getsockname())

    async def close(self) -> None:
        self._server.close()
        self.cut()
        await asyncio.sleep(0)  # a connection accepted just now gets to its first line, and so to its `finally`
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    # --- what a test does to the link -------------------------------------------------------------------------

    def cut(self, *, down: bool = False) -> None:
        """Reset every connection; `down`: and let nobody connect any more."""
        self.is_down = down
        self._held.clear()
        self._overtaken.clear()
        self._flowing.set()
        for link in tuple(self._links):
            self.num_cut += 1
            link.abort()

    def stall(self) -> None:
        """Pass nothing on, not even heartbeats, and keep the connections; `num_stalled` counts what is stuck."""
        self.num_stalled = 0
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()
        if self.hold is None:
            self.release()

    def arm(self, fault: str) -> None:
        """The next message of a transfer meets `fault`, once; `num_fired` counts."""
        self._fault, self.num_fired = fault, 0

    def release(self) -> None:
        """Let go of what is held, in order; on a stalled link that is when it flows again."""
        self.hold = None
        if not self._flowing.is_set():
            return
        held, self._held = self._held, []
        for passing in held:
            self._pass_on(passing)

    def inject(self, passing: Passing) -> None:
        """A late copy of a message that has passed arrives now, untouched."""
        passing.write()

    def inject_faulty(self, passing: Passing) -> None:
        """A late copy that meets the armed fault."""
        self._pass_on(passing)

    def last(self, direction: str, kind: type) -> Passing | None:
        """The latest message of `kind` that came this way, held or passed."""
        found = [p for p in self.history if p.direction == direction and isinstance(p.message, kind)]
        return found[-1] if found else None

    def is_holding(self, kind: type) -> bool:
        return any(isinstance(passing.message, kind) for passing in self._held)

    @property
    def num_links(self) -> int:
        return len(self._links)

    # --- relaying ---------------------------------------------------------------------------------------------

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        try:
            if not self.is_down:
                await self._connect(from_client, to_client)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # one side ended: so does the other
        finally:
            to_client.transport.abort()
            self._relays.discard(task)

    async def _connect(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        parts = urlsplit(self.target)
        from_server, to_server = await asyncio.open_connection(parts.hostname, parts.port)
        link = _Link({UP: to_server, DOWN: to_client})
        self._links.add(link)
        relays = {
            asyncio.ensure_future(self._relay(link, UP, from_client)),
            asyncio.ensure_future(self._relay(link, DOWN, from_server)),
        }
        try:
            await asyncio.wait(relays, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._links.discard(link)
            for relay in relays:
                relay.cancel()
            await asyncio.gather(*relays, return_exceptions=True)
            link.abort()

    async def _relay(self, link: _Link, direction: str, source: asyncio.StreamReader) -> None:
        if not self._is_zmtp:
            return await self._relay_raw(link, direction, source)
        left = GREETING_NBYTES
        while left:  # in the pieces it comes in: each side waits for the first half of the other
            piece = await source.read(left)
            if not piece:
                return None
            link.writers[direction].write(piece)
            left -= len(piece)
        was_more = False
        while True:
            flags = (await source.readexactly(1))[0]
            nbytes = int.from_bytes(await source.readexactly(8 if flags & LONG else 1), "big")
            body = await source.readexactly(nbytes)
            self.num_stalled += not self._flowing.is_set()
            await self._flowing.wait()
            is_plain = not (was_more or flags & (MORE | COMMAND))
            if was_more and self.flip_payload_at is not None:
                body = self._flip(body)
            was_more = bool(flags & MORE)
            self._take(Passing(link, direction, flags & ~LONG, body, read_transfer(body) if is_plain else None))
            await link.writers[direction].drain()

    async def _relay_raw(self, link: _Link, direction: str, source: asyncio.StreamReader) -> None:
        while chunk := await source.read(1 << 16):
            self.num_stalled += not self._flowing.is_set()
            await self._flowing.wait()
            is_payload = direction == DOWN and len(chunk) > MIN_FLIPPED_NBYTES
            link.writers[direction].write(
                self._flip(chunk) if is_payload and self.flip_payload_at is not None else chunk
            )
            await link.writers[direction].drain()

    def _flip(self, body: bytes) -> bytes:
        assert self.flip_payload_at is not None
        at, self.flip_payload_at = self.flip_payload_at % len(body), None
        self.num_flipped += 1
        return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]

    def _take(self, passing: Passing) -> None:
        if passing.message is None:
            passing.write()
            return
        self.history.append(passing)
        if self.rewrite is not None:
            passing.message = self.rewrite(passing.direction, passing.message)
            passing.body = encode(passing.message)
        if self.hold is not None and self.hold(passing.direction, passing.message):
            self._held.append(passing)
        else:
            self._pass_on(passing)

    def _pass_on(self, passing: Passing) -> None:
        fault, self._fault = self._fault, ""
        self.num_fired += bool(fault)
        match fault:
            case "dropped":
                return
            case "duplicated":
                passing.write()
                passing.write()
            case "reordered":
                self._overtaken.append(passing)
                return
            case "delayed":
                asyncio.get_running_loop().call_later(self._delay_s, passing.write)
                return
            case "truncated":
                passing.write(passing.body[: self._rng.randrange(len(passing.body))])
            case "random bytes":
                passing.write(self._rng.randbytes(len(passing.body)))
            case _:
                passing.write()
        late = [waiting for waiting in self._overtaken if waiting.direction == passing.direction]
        self._overtaken = [waiting for waiting in self._overtaken if waiting.direction != passing.direction]
        for waiting in late:
            waiting.write()


def read_transfer(body: bytes) -> Any:
    """The message of a transfer in a frame, or None when it holds something else."""
    try:
        message = decode(body)
    except RemoteProtocolError:
        return None
    return message if hasattr(message, "header") else None
