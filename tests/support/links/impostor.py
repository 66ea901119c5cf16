"""A peer that knows the cluster's keys and says what a test likes to the prefill worker of a trio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from support.links.shell_pair import IDENTITY, KEYS, ShellTrio

from disagg.transceiver.wire.links import ControlClient
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.values import AttemptKey
from disagg.transceiver.wire.node import draw_id


class Impostor:
    """A decode worker by its HELLO, and whatever it likes afterwards."""

    def __init__(self, client: ControlClient, trio: ShellTrio) -> None:
        self.client, self.incarnation = client, draw_id()
        self.prefill = trio.prefill.registration.node.incarnation
        self.geometry = trio.prefill.registration.node.geometry

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, trio: ShellTrio) -> AsyncIterator[Impostor]:
        client = await ControlClient.connect(trio.links.control.target, KEYS)
        try:
            async with asyncio.timeout(5):
                await client.ready()
            yield cls(client, trio)
        finally:
            await client.close()

    async def hello(self, incarnation: str = "") -> p.Welcome:
        await self.client.send(p.Hello(incarnation or self.incarnation, "x", IDENTITY, self.geometry, ("shm", "zmq")))
        return await self.next(p.Welcome)

    def header(self, key: AttemptKey, **changes: Any) -> p.Header:
        return replace(p.Header(self.incarnation, self.prefill, key.transfer_id, key.epoch, 1), **changes)

    async def next(self, kind: type | tuple[type, ...]) -> Any:
        """The next message of `kind`; others are read past."""
        async with asyncio.timeout(5):
            while not isinstance(message := await self.client.recv(), kind):
                pass
        return message

    async def was_heard(self) -> None:
        """Until everything said so far was dealt with: a last question has been answered."""
        transfer_id = draw_id()
        await self.client.send(p.Ack(self.header(AttemptKey(transfer_id, 1))))
        while (await self.next(p.Closed)).header.transfer_id != transfer_id:
            pass
