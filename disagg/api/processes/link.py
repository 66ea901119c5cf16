"""One end of the socket between the router and an API process: whole messages, many to a system call."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any, Final

from disagg.api.processes.messages import MAX_FRAME_NBYTES, pack_message, unpack_message
from disagg.transceiver.wire.turns import TaskTurn

LENGTH: Final = struct.Struct("<I")
READ_NBYTES: Final = 1 << 20  # read ahead: some thousand tokens


class ProcessLink:
    """`send` never waits: what is written in one turn of the loop goes out together at its end.

    Its callers bound what is unsent: a prompt waits for `drain`, and tokens are sent by credit.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._unsent: list[bytes] = []
        self._turn = TaskTurn()

    @classmethod
    async def open(cls, end: socket.socket) -> ProcessLink:
        """Owns `end`, a connected Unix stream socket."""
        return cls(*await asyncio.open_unix_connection(sock=end, limit=READ_NBYTES))

    def send(self, message: Any) -> None:
        """Queue one message; nothing when the other end is gone, which `receive` tells."""
        data = pack_message(message)
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent += (LENGTH.pack(len(data)), data)

    async def drain(self) -> None:
        """Wait until the other end has taken most of what was sent."""
        self._flush()
        try:
            await self._writer.drain()
        except ConnectionError:  # as above
            return

    async def receive(self) -> Any:
        """The next message. Raises EOFError when the other end is gone, ValueError when it sent none."""
        await self._turn.yield_if_over()
        try:
            (nbytes,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            if nbytes > MAX_FRAME_NBYTES:
                raise ValueError(f"a message of {nbytes} bytes, expected {MAX_FRAME_NBYTES} at most")
            return unpack_message(await self._reader.readexactly(nbytes))
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            raise EOFError("the other process is gone") from exc

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and not self._writer.is_closing():
            self._writer.write(b"".join(unsent))
