"""A worker without an engine: registers at a real router over a real socket and says what a test tells it to say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from support.cluster.router_harness import make_link, make_register
from support.event_loop import PATIENCE_S

from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.links import ControlClient
from disagg.transceiver.wire.messages.peer import Refused
from disagg.transceiver.wire.messages.router import (
    CancelRequest,
    Dispatch,
    Finished,
    Lease,
    Peers,
    Register,
    Registered,
)
from disagg.transceiver.wire.messages.tokens import StepTokens, TokenCredit, Tokens
from disagg.transceiver.wire.messages.values import MetricSample
from disagg.transceiver.wire.timing import HEARTBEAT_S

M = TypeVar("M")


class FakeWorker:
    """Leases run by themselves; links to announced prefill workers are ready at once; orders wait in a queue."""

    def __init__(self, client: ControlClient, register: Register) -> None:
        self.register = register
        self.links: tuple[str, ...] = ()
        self.metrics: tuple[MetricSample, ...] = ()
        self.holding: tuple[tuple[str, int], ...] = ()
        self.num_refusals = 0
        self._client = client
        self._router = ""
        self._orders: asyncio.Queue[Any] = asyncio.Queue()
        self._is_still = False

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, endpoint: str, keys: ClusterKeys, worker_id: str, role: str, **fields: Any
    ) -> AsyncIterator[FakeWorker]:
        """A registered worker; leaving the block closes its socket, which is what kill -9 looks like from outside."""
        client = await ControlClient.connect(endpoint, keys)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await client.ready()
            worker = cls(client, make_register(worker_id, role, **fields))
            await worker._register()
            tasks = [asyncio.create_task(worker._read()), asyncio.create_task(worker._renew())]
            try:
                yield worker
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await client.close()

    async def expect(self, kind: type[M]) -> M:
        """The next order, which must be a `kind`."""
        async with asyncio.timeout(PATIENCE_S):
            message = await self._orders.get()
        assert isinstance(message, kind), message
        return message

    async def expect_after_others(self, kind: type[M]) -> M:
        """The next order of this kind, whatever comes before it."""
        async with asyncio.timeout(PATIENCE_S):
            while not isinstance(message := await self._orders.get(), kind):
                pass
        return message

    def send_bytes(self, data: bytes) -> None:
        """One frame as it stands, message or not."""
        self._client._connection.send([data])

    def has_no_orders(self) -> bool:
        return self._orders.empty()

    async def say(self, message: Any) -> None:
        """A message; `Tokens` as the only row of one."""
        await self._client.send(StepTokens.of([message]) if isinstance(message, Tokens) else message)

    async def answer(self, dispatch: Dispatch, *token_ids: int, reason: str = "length") -> None:
        """Emit all tokens one by one, then the end."""
        for index, token_id in enumerate(token_ids):
            await self.say(Tokens(dispatch.transfer_id, dispatch.epoch, index, (token_id,)))
        await self.say(Finished(dispatch.transfer_id, dispatch.epoch, len(token_ids), reason))

    async def renew(self, **fields: Any) -> None:
        """One lease now."""
        lease = Lease(
            self.register.incarnation,
            self._router,
            metrics=self.metrics,
            requests=self.holding,
            blocks_used=(3, 1),
            blocks_free=(59, 29),
            links=tuple(make_link(peer) for peer in self.links),
            **fields,
        )
        await self.say(lease)

    async def _register(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            answer = await self._ask()
        if isinstance(answer, Refused):
            raise Rejected(answer)
        assert isinstance(answer, Registered)
        self._router = answer.router_incarnation

    async def _ask(self) -> Any:
        """REGISTER until something other than a lease answers."""
        while True:
            await self.say(self.register)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S / 2):
                    while isinstance(answer := await self._client.recv(), Lease):
                        pass
                    return answer

    async def _renew(self) -> None:
        while True:
            if not self._is_still:
                await self.renew()
            await asyncio.sleep(HEARTBEAT_S)

    def stop_leases(self) -> None:
        """As a process that was stopped: connected, and silent."""
        self._is_still = True

    async def _read(self) -> None:
        while True:
            match message := await self._client.recv():
                case Lease() | TokenCredit():
                    pass
                case Refused():
                    self.num_refusals += 1
                case Peers(peers, gone):
                    kept = tuple(link for link in self.links if link not in gone)
                    self.links = (*kept, *(peer.incarnation for peer in peers))
                    await self.renew()
                case CancelRequest(transfer_id):
                    self.holding = tuple(held for held in self.holding if held[0] != transfer_id)
                    self._orders.put_nowait(message)
                case _:
                    self._orders.put_nowait(message)


class Rejected(Exception):
    """The router refused the registration."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.field)
        self.refused = refused
