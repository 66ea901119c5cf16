"""A backend seen through the link of an API process, both ends in this process; and real API processes over one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from support.cluster.fake_backend import FakeBackend
from support.cluster.openai_client import Api

from disagg.api.http.acceptor import BACKLOG
from disagg.api.http.server import bind
from disagg.api.processes.core_side import CoreSide
from disagg.api.processes.fleet import ApiProcesses
from disagg.api.processes.link import ProcessLink
from disagg.api.processes.messages import CoreState
from disagg.api.processes.remote_backend import RemoteBackend
from disagg.api.settings import ApiSettings


@dataclass
class Linked:
    """`remote` is what an API process sees of `backend`."""

    backend: FakeBackend
    remote: RemoteBackend
    side: CoreSide


@contextlib.asynccontextmanager
async def linked(backend: FakeBackend | None = None) -> AsyncIterator[Linked]:
    backend = backend or FakeBackend()
    ours, theirs = socket.socketpair()
    remote_link = await ProcessLink.open(theirs)
    remote, side = RemoteBackend(remote_link), CoreSide(backend, await ProcessLink.open(ours))
    tasks = [asyncio.create_task(remote.run()), asyncio.create_task(side.run())]
    side.tell(CoreState(backend.is_ready(), backend.max_model_len()))
    async with asyncio.timeout(20):
        while not remote.is_ready():  # noqa: ASYNC110 (one message, which nothing announces)
            await asyncio.sleep(0)
        try:
            yield Linked(backend, remote, side)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            remote_link.close()


class ProcessApi(Api):
    """An API of several processes, for clients that open a connection for each request."""

    def __init__(self, url: str, backend: FakeBackend, session: aiohttp.ClientSession, processes: ApiProcesses) -> None:
        super().__init__(url, backend, session)
        self.processes = processes


@contextlib.asynccontextmanager
async def served_by_processes(
    settings: ApiSettings, count: int, backend: FakeBackend | None = None, send_nbytes: int | None = None
) -> AsyncIterator[ProcessApi]:
    """Real API processes over a backend in this one. `send_nbytes`: of each connection's buffer; None = it grows."""
    backend = backend or FakeBackend()
    with await bind("127.0.0.1", 0) as listening:
        if send_nbytes is not None:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_nbytes)  # accepted sockets inherit it
        listening.listen(BACKLOG)
        url = "http://{}:{}".format(*listening.getsockname())
        async with (
            ApiProcesses.open(backend, settings, listening, count, "warning") as processes,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
        ):
            yield ProcessApi(url, backend, session, processes)
