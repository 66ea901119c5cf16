"""A trio with a second prefill worker, for whom a transfer that failed is meant."""

from __future__ import annotations

from typing import Any

from support.event_loop import until
from support.faults.cells import Cell
from support.links.message_proxy import MessageProxy
from support.links.shell_pair import Links, ShellTrio, ShellWorker

SPARE = "spare"


class SpareTrio(ShellTrio):
    spare: ShellWorker

    @property
    def workers(self) -> tuple[ShellWorker, ...]:
        return (*super().workers, *([self.spare] if hasattr(self, "spare") else []))

    async def start(self) -> None:
        self._spare_links = Links(
            MessageProxy(), MessageProxy(is_zmtp=self.plane != "tcp"), {"prefill": MessageProxy()}
        )
        for proxy in self._spare_links.all:
            await proxy.start()
        await super().start()
        self._spare_links.router["prefill"].target = self.router.endpoint
        self.spare = ShellWorker("prefill", self._spare_links, self.plane, SPARE)
        self.spare.wrong = self.wrong
        self.decode.sources = (self.prefill, self.spare)
        self.spare.start()
        await until(lambda: len(self.router.cluster.registry) == 3, "the spare worker is registered")
        await self.ready()

    async def close(self) -> None:
        if hasattr(self, "spare"):
            await self.spare.close()
        await super().close()
        for proxy in self._spare_links.all:
            await proxy.close()


class RetargetCell(Cell):
    """The first attempt goes to the prefill worker that the fault concerns; once it is placed the spare one is free."""

    trio: SpareTrio

    async def run(self) -> tuple[str, float]:
        await until(self._knows_links, "the router knows of both links")  # it is a lease behind
        assert self.trio.router.drain(SPARE)
        return await super().run()

    async def _steer(self, num_landed: int) -> None:
        assert self.trio.router.drain(SPARE, False)  # before a failure that is part of the way is reported
        await super()._steer(num_landed)

    async def halt(self) -> None:
        await super().halt()
        self.request_id = self.trio.router._streams[self.key.transfer_id].attempts.request.request_id

    def _knows_links(self) -> bool:
        (decode,) = [worker for worker in self.trio.router.workers() if worker["role"] == "decode"]
        return [link["state"] for link in decode["links"]] == ["ready", "ready"]

    def attempts(self) -> list[dict[str, Any]]:
        record = self.trio.router.record(self.request_id)
        assert record is not None
        return list(record["attempts"])
