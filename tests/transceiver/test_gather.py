"""A sender that packs: one slice is gathered while the one before it leaves."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from support.event_loop import in_event_loop, within

from disagg.transceiver.peers.prefill_side import _Peer


class Steps:
    """A cut and a plane that say what they do, and a plane whose sends end when they are told to."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.may_leave = asyncio.Semaphore(0)

    def pack(self, units: Any) -> Any:
        self.said.append(f"pack {units[0]}")
        return SimpleNamespace(units=units, regions=())

    async def send(self, peer: str, transfer_id: str, epoch: int, number: int, units: Any, regions: Any) -> None:
        self.said.append(f"send {number}")
        await self.may_leave.acquire()


@in_event_loop
async def test_one_slice_is_packed_while_another_leaves_and_no_more_than_one() -> None:
    steps: Any = Steps()
    peer = _Peer(None, b"", 0.0)  # type: ignore[arg-type]

    async def settled(said: list[str]) -> None:
        while steps.said != said:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert steps.said == said

    async with asyncio.TaskGroup() as tasks:
        for number in range(4):
            tasks.create_task(peer.send_packed(steps, steps, ("me", "t", 1, number), [number]))  # type: ignore[list-item]
        await within(settled(["pack 0", "send 0", "pack 1"]))
        steps.may_leave.release()
        await within(settled(["pack 0", "send 0", "pack 1", "send 1", "pack 2"]))
        for _ in range(3):
            steps.may_leave.release()
    assert [step for step in steps.said if step.startswith("send")] == ["send 0", "send 1", "send 2", "send 3"]
