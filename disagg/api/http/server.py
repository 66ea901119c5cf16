"""uvicorn as a part of a running event loop: our signals, our sockets, our shutdown."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from disagg.api.http.acceptor import BACKLOG, accept
from disagg.api.http.connection import KEEP_ALIVE_S, HttpConnection
from disagg.api.http.connections import Connections


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a server listens; `port` is the real one when 0 was asked for."""

    host: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


class _Server(uvicorn.Server):
    """A server that leaves signals to the process it is part of and says when it accepts."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepts = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Clients are accepted by a task of our own (see `accept`)."""
        self.servers = []
        self.started = True
        self.accepts.set()


@asynccontextmanager
async def serve(
    app: ASGIApp, host: str, port: int, *, shutdown_timeout_s: int = 5, connections: Connections | None = None
) -> AsyncIterator[Listener]:
    """Serve `app` for the life of the context. Port 0 takes a free one. `connections` bounds the clients.

    On exit: no new connections, `shutdown_timeout_s` for running requests, then they are cancelled.
    Raises OSError, with a sentence, when the address cannot be bound.
    """
    bound = await bind(host, port)
    async with serve_on(bound, app, shutdown_timeout_s=shutdown_timeout_s, connections=connections) as listener:
        yield listener


@asynccontextmanager
async def serve_on(
    bound: socket.socket, app: ASGIApp, *, shutdown_timeout_s: int = 5, connections: Connections | None = None
) -> AsyncIterator[Listener]:
    """As `serve`, on a bound socket, which it owns; other processes may accept from it too."""
    host, port = bound.getsockname()[:2]
    config = _config(app, shutdown_timeout_s)
    server, book = _Server(config), Connections() if connections is None else connections

    def make(is_refused: bool) -> HttpConnection:
        return HttpConnection(config, server.server_state, book, is_refused=is_refused)

    task = asyncio.create_task(server.serve([bound]), name=f"http {host}:{port}")
    await server.accepts.wait()
    bound.listen(BACKLOG)
    accepting = asyncio.create_task(accept(bound, make, book), name=f"accept {host}:{port}")
    try:
        yield Listener(host, port)
    finally:
        accepting.cancel()
        await asyncio.wait([accepting])
        server.should_exit = True
        await asyncio.wait([task])
        bound.close()
        task.result()


def _config(app: ASGIApp, shutdown_timeout_s: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,  # the process set its logging up already
        log_level="error",  # its coming and going is ours to tell, and what clients send wrong is theirs to hear
        access_log=False,
        proxy_headers=False,  # nothing here depends on the client's address
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=shutdown_timeout_s,
    )


async def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises OSError in words that name address and port."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise OSError(exc.errno, f"cannot listen on `{host}`: not a known host name or address") from exc
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for TIME_WAIT
        bound.bind(address)
    except OSError as exc:
        bound.close()
        why = (
            "the port is in use; choose another, or 0 for a free one" if exc.errno == errno.EADDRINUSE else exc.strerror
        )
        raise OSError(exc.errno, f"cannot listen on {host}:{port}: {why}") from exc
    bound.setblocking(False)
    return bound
