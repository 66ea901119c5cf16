"""Takes clients from a listening socket, one at a time, so that their number is known before the next one."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from functools import partial
from typing import Final

from disagg.api.http.connections import Connections

RETRY_S: Final = 0.1  # after which a descriptor may be free again
BACKLOG: Final = 2048  # clients that the kernel keeps waiting for us; uvicorn's default
EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

MakeProtocol = Callable[[bool], asyncio.Protocol]
"""The protocol of one client; true where the client is to be refused."""


async def accept(listening: socket.socket, make: MakeProtocol, connections: Connections) -> None:
    """Accept until cancelled. The socket listens."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            client, _ = await loop.sock_accept(listening)
        except OSError as exc:
            if exc.errno in EXHAUSTED:
                connections.note(f"no client can be accepted: {exc.strerror}", len(connections))
                connections.drop_oldest()
                await asyncio.sleep(RETRY_S)
            continue  # any other is the one client's: it left before it was accepted
        is_refused = not connections.make_room()
        try:
            await loop.connect_accepted_socket(partial(make, is_refused), client)
        except OSError:  # as above
            client.close()
