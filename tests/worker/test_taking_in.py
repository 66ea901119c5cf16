"""KV on its way to a device: nothing of its attempt overtakes the copy, nothing of others waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest
from support.oracles.cache_oracle import tiny_layout

from disagg.cache.cache import KVCache
from disagg.engine.commands import AttemptKey, Command, Decode, Release
from disagg.worker.taking_in import TakingIn

LAYOUT = tiny_layout(None, block_size=4)


class Device(Executor):
    """A copy queue with a clock of its own: what was queued happens when the test says that its time has come."""

    def __init__(self) -> None:
        self.queue: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.is_shut = False

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.queue.append((future, lambda: work(*args, **options)))
        return future

    def tick(self) -> None:
        """The oldest copy is done."""
        future, work = self.queue.pop(0)
        try:
            future.set_result(work())
        except BaseException as error:  # as an executor hands it on
            future.set_exception(error)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.is_shut = True


class Scene:
    """A staged cache, the device's queue, and what reached the model thread."""

    def __init__(self, *, is_staged: bool = True) -> None:
        self.cache = KVCache(LAYOUT, (12,), is_staged=is_staged)
        self.device, self.commands, self.faults = Device(), list[Command](), list[AttemptKey]()
        self.taking_in = TakingIn(self.cache, "cpu", self.commands.append, self.device)

    def decode(self, number: int, slots: Sequence[int]) -> Decode:
        command = Decode(key(number), None)  # type: ignore[arg-type]
        self.taking_in.decode(command, [slots], lambda of, fault: self.faults.append(of))
        return command

    async def tick(self) -> None:
        self.device.tick()
        for _ in range(3):  # the future's turn, the loop's, and the callback's
            await asyncio.sleep(0)


def key(number: int) -> AttemptKey:
    return AttemptKey(f"{number:032x}", 1)


def test_a_request_decodes_when_its_kv_is_on_the_device() -> None:
    async def scenario() -> None:
        scene = Scene()
        sides = scene.cache.pools[0].sides
        sides.host[[3, 4]] = 7
        command = scene.decode(1, [3, 4])
        assert scene.commands == []
        assert not sides.slots.any(), "nothing is copied by the event loop or the model thread"
        await scene.tick()
        assert scene.commands == [command]
        assert (sides.slots[[3, 4]] == 7).all()
        assert not sides.slots[5:].any()

    asyncio.run(scenario())


def test_a_release_waits_behind_the_copy_and_other_attempts_do_not() -> None:
    """Else its slots would be another's while the copy writes them."""

    async def scenario() -> None:
        scene = Scene()
        command = scene.decode(1, [3])
        scene.taking_in.submit(Release(key(1)))
        scene.taking_in.submit(Release(key(2)))
        assert scene.commands == [Release(key(2))]
        await scene.tick()
        assert scene.commands == [Release(key(2)), command, Release(key(1))]
        scene.taking_in.submit(Release(key(1)))
        assert scene.commands[-1] == Release(key(1)), "and after it at once"

    asyncio.run(scenario())


def test_copies_of_several_attempts_pass_in_their_order() -> None:
    async def scenario() -> None:
        scene = Scene()
        commands = [scene.decode(number, [3 + number]) for number in range(3)]
        for count in range(1, 4):
            await scene.tick()
            assert scene.commands == commands[:count]

    asyncio.run(scenario())


def test_a_copy_that_fails_costs_its_attempt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        scene = Scene()

        def refuse(group: int, slots: Sequence[int]) -> None:
            raise RuntimeError("CUDA error: an illegal memory access")

        with monkeypatch.context() as patch:
            patch.setattr(scene.cache, "take_in", refuse)
            scene.decode(1, [3])
            scene.taking_in.submit(Release(key(1)))
            await scene.tick()
        assert scene.faults == [key(1)]
        assert scene.commands == [Release(key(1))], "it never decodes what is not there"
        command = scene.decode(2, [4])
        await scene.tick()
        assert scene.commands[-1] == command

    asyncio.run(scenario())


@pytest.mark.parametrize(("is_staged", "slots"), [(False, [3]), (True, [])])
def test_where_nothing_is_to_be_copied_a_request_decodes_at_once(is_staged: bool, slots: list[int]) -> None:
    async def scenario() -> None:
        scene = Scene(is_staged=is_staged)
        command = scene.decode(1, slots)
        assert (scene.commands, scene.device.queue) == ([command], [])

    asyncio.run(scenario())


def test_the_copies_run_on_one_thread_that_uses_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    async def scenario() -> None:
        cache, done = KVCache(LAYOUT, (12,), is_staged=True), asyncio.Event()
        monkeypatch.setattr(cache, "take_in", lambda group, slots: ran.append(threading.current_thread().name))
        monkeypatch.setattr("disagg.worker.taking_in.use_device", ran.append)
        taking_in = TakingIn(cache, "cpu", lambda command: done.set())
        for number in range(2):
            done.clear()
            taking_in.decode(Decode(key(number), None), [[3]], lambda of, fault: None)  # type: ignore[arg-type]
            await asyncio.wait_for(done.wait(), 10)
        taking_in.close()

    asyncio.run(scenario())
    assert ran[0] == "cpu"
    assert len(set(ran[1:])) == 1
    assert ran[1].startswith("taking in")


def test_a_command_that_did_not_wait_would_be_noticed() -> None:
    """The checks above can fail: without a lane the release comes first, and the copy writes what is another's."""

    async def scenario() -> None:
        scene = Scene()
        scene.decode(1, [3])
        scene.taking_in._lanes.clear()
        scene.taking_in.submit(Release(key(1)))
        assert scene.commands == [Release(key(1))]
        scene.cache.pools[0].sides.slots[3] = 9  # its next owner's
        assert np.all(scene.cache.pools[0].sides.slots[3].numpy() == 9)
        scene.device.queue[0][1]()
        assert not np.all(scene.cache.pools[0].sides.slots[3].numpy() == 9)

    asyncio.run(scenario())
