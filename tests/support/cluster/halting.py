"""For `faulty_worker.py`: stops transfers of a real worker in a state of the table, and tells in which they are.

Messages are not held on their way but dropped: whatever matters is repeated until it is answered, so a transfer stands
still for as long as the fault is on and goes on by itself afterwards. Events of the engine are held back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from support.faults.switches import Faults

LOOK_S = 0.02


def mute(faults: Faults) -> None:
    """Messages of the kinds that `mute` names never leave this process."""
    from disagg.transceiver.wire import links

    def unless_muted(plain: Any) -> Any:
        async def send(self: Any, *arguments: Any) -> None:
            if type(arguments[-1]).__name__ in faults.words("mute"):
                faults.fires("mute")
                return
            await plain(self, *arguments)

        return send

    for kind in (links.ControlServer, links.ControlClient):
        kind.send = unless_muted(kind.send)


def hold_events(faults: Faults) -> None:
    """What an engine of some role reports stays behind, all of it or all but the first of a request: `hold_ROLE`."""
    from disagg.worker import parts

    plain = parts.WorkerParts.take_events
    held: list[Any] = []
    seen: Counter[tuple[Any, str]] = Counter()

    def holds(name: str, event: Any) -> bool:
        kind = type(event).__name__
        seen[event.key, kind] += 1
        is_first = seen[event.key, kind] == 1
        return kind in faults.words(name) or (kind in faults.words(name, "after_first") and not is_first)

    def take_events(self: Any, events: Sequence[Any]) -> None:
        name = f"hold_{self.role}"
        for event in events:
            if not holds(name, event):
                plain(self, [event])
                continue
            if not held:
                faults.fires(name)
                asyncio.get_running_loop().call_later(LOOK_S, let_go, self, name)
            held.append(event)

    def let_go(self: Any, name: str) -> None:
        if faults.names_any(name):
            asyncio.get_running_loop().call_later(LOOK_S, let_go, self, name)
            return
        plain(self, held)
        held.clear()

    parts.WorkerParts.take_events = take_events


def tell_states(faults: Faults) -> None:
    """`state-ROLE` says where the newest attempt stands: "EPOCH STATE"."""
    from disagg.transceiver.peers.live import Transfers

    plain_feed = Transfers.feed

    def feed(self: Any, key: Any, event: Any) -> None:
        transfer = self._live.get(key)
        before = transfer and transfer.state
        plain_feed(self, key, event)
        if transfer is not None and transfer.state is not before:
            faults.tell(f"state-{transfer.role.value}", f"{key.epoch} {transfer.state.value}")

    Transfers.feed = feed


def fail_computations(faults: Faults) -> None:
    """`fail_compute`: the prompts of all transfers that are being sent cannot be computed to their end."""
    from disagg.transceiver.peers.live import Transfers
    from disagg.transceiver.protocol.events import ComputeFailed
    from disagg.transceiver.protocol.state import Role, State

    plain = Transfers.tick

    async def look(self: Any) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            sent = [k for k, t in self._live.items() if (t.role, t.state) == (Role.SENDER, State.SENDING)]
            if sent and faults.fires("fail_compute"):
                for key in sent:
                    self.feed(key, ComputeFailed("a failure by the test"))

    async def tick(self: Any) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(plain(self))
            tasks.create_task(look(self))

    Transfers.tick = tick


PATCHES = (mute, hold_events, tell_states, fail_computations)
