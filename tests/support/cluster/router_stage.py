"""A router over real sockets with fake workers around it, as the HTTP layer sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from support.cluster.fake_worker import FakeWorker
from support.event_loop import DEADLINE_S, until

from disagg.router.generation import GenerationEnd, GenerationRequest
from disagg.router.router import Router, RouterOptions
from disagg.transceiver.wire.keys import ClusterKeys

KEYS = ClusterKeys.from_secret(b"a secret of the tests, long enough")


@dataclass
class Stage:
    """A router with fake workers around it."""

    router: Router
    workers: contextlib.AsyncExitStack

    async def add(self, worker_id: str, role: str, **fields: Any) -> FakeWorker:
        opened = FakeWorker.open(self.router.endpoint, KEYS, worker_id, role, **fields)
        return await self.workers.enter_async_context(opened)

    async def pair(self) -> tuple[FakeWorker, FakeWorker]:
        prefill, decode = await self.add("p0", "prefill"), await self.add("d0", "decode")
        await until(self.router.is_ready)
        return prefill, decode


@contextlib.asynccontextmanager
async def stage(**options: Any) -> AsyncIterator[Stage]:
    async with (
        asyncio.timeout(DEADLINE_S),
        Router.open("tcp://127.0.0.1:0", KEYS, RouterOptions(**options)) as router,
        contextlib.AsyncExitStack() as workers,
    ):
        yield Stage(router, workers)
        router.check_invariants()


async def collect(router: Router, request: GenerationRequest) -> tuple[list[int], GenerationEnd]:
    token_ids: list[int] = []
    async for item in router.generate(request):
        if isinstance(item, GenerationEnd):
            return token_ids, item
        assert item.index == len(token_ids)
        token_ids += item.token_ids
    raise AssertionError("the stream ended as if complete")


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]
