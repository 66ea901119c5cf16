"""A busy event loop is slow and not dead, a hung one is found; steps are told before they run."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from support.cluster.router_harness import GEOMETRY, IDENTITY, make_register
from support.event_loop import PATIENCE_S, in_event_loop, until

from disagg.engine.commands import AttemptKey
from disagg.router.router import Router
from disagg.transceiver.wire import pulse
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages import router as r
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.sockets import Sockets
from disagg.transceiver.wire.timing import LOST_S
from disagg.worker.router_link import RouterLink, RouterLost
from disagg.worker.vitals import Vitals

KEYS = ClusterKeys.from_secret(b"a secret of the tests, long enough")
ME = "w" * 32
STALL_S = LOST_S + 1.5


class Elsewhere:
    """An event loop on a thread of its own: another process, as far as its peer can tell."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    async def enter(self, context: Any) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(context.__aenter__(), self.loop))

    async def leave(self, context: Any) -> None:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), self.loop))

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Its loop, within the block."""
        go_on = threading.Event()
        self.loop.call_soon_threadsafe(go_on.wait, 4 * PATIENCE_S)
        try:
            yield
        finally:
            go_on.set()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    made = Elsewhere()
    yield made
    made.close()


class Registered:
    """One registration that runs, as `link`, and how it ended."""

    def __init__(self, link: RouterLink) -> None:
        self.link = link
        self.end: BaseException | None = None

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.link.keep())
                tasks.create_task(self._read())
        except* RouterLost as lost:
            self.end = lost.exceptions[0]

    async def _read(self) -> None:
        while True:
            await self.link.next_message()


@contextlib.asynccontextmanager
async def registered(
    endpoint: str, *, has_pulses: bool = True, is_sound: Callable[[], bool] = lambda: True
) -> AsyncIterator[tuple[Registered, Vitals]]:
    sockets = Sockets(KEYS)
    vitals = Vitals(sockets, is_sound)
    node = Node(ME, "worker", IDENTITY, GEOMETRY, KEYS)
    opened = RouterLink.open(
        endpoint,
        node,
        sockets,
        make_register("worker", "both", incarnation=ME),
        lambda router: r.Lease(ME, router),
        vitals if has_pulses else None,
    )
    try:
        async with opened as link:
            worker = Registered(link)
            running = asyncio.create_task(worker.run())
            yield worker, vitals
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    finally:
        sockets.close()


@pytest.mark.parametrize("has_pulses", [True, False], ids=["pulses", "leases of the loop alone"])
def test_a_worker_whose_loop_stands_still_for_longer_than_a_dead_one_keeps_its_registration(
    elsewhere: Elsewhere, has_pulses: bool
) -> None:
    @in_event_loop
    async def scenario() -> None:
        async with Router.open("tcp://127.0.0.1:0", KEYS) as router:
            context = registered(router.endpoint, has_pulses=has_pulses)
            worker, _ = await elsewhere.enter(context)
            await until(lambda: router.cluster._pulses.heard_at(ME) > 0, "a pulse")
            with elsewhere.standing_still():
                await asyncio.sleep(STALL_S)
                assert (router.cluster.registry.get(ME) is not None) is has_pulses
            await (asyncio.sleep(1.5) if has_pulses else until(lambda: worker.end, "it hears that it was lost"))
            assert (worker.end is None) is has_pulses
            await elsewhere.leave(context)

    scenario()


def test_a_router_whose_loop_stands_still_for_longer_than_a_dead_one_keeps_its_workers(elsewhere: Elsewhere) -> None:
    @in_event_loop
    async def scenario() -> None:
        context = Router.open("tcp://127.0.0.1:0", KEYS)
        router = await elsewhere.enter(context)
        async with registered(router.endpoint) as (worker, _):
            with elsewhere.standing_still():
                await asyncio.sleep(STALL_S)
            await asyncio.sleep(1.5)
            assert worker.end is None
            assert router.cluster.registry.get(ME) is not None
        await elsewhere.leave(context)

    scenario()


def test_a_worker_whose_loop_hangs_for_good_is_lost(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "HUNG_S", 1.0)

    @in_event_loop
    async def scenario() -> None:
        async with Router.open("tcp://127.0.0.1:0", KEYS) as router:
            context = registered(router.endpoint)
            await elsewhere.enter(context)
            await until(lambda: router.cluster._pulses.heard_at(ME) > 0, "a pulse")
            with elsewhere.standing_still():
                await until(lambda: router.cluster.registry.get(ME) is None, "the router gives it up")
            await elsewhere.leave(context)

    scenario()


@in_event_loop
async def test_the_new_requests_of_a_step_are_known_before_it_ends_the_process() -> None:
    key, other = AttemptKey("t" * 32, 2), AttemptKey("u" * 32, 1)
    async with Router.open("tcp://127.0.0.1:0", KEYS) as router, registered(router.endpoint) as (_, vitals):
        tell = vitals.news.tell
        await asyncio.to_thread(tell, [key, other])  # at once: before any connection of it can be ready
        await until(lambda: router.cluster.in_step(ME) == {key.transfer_id: 2, other.transfer_id: 1})
        await asyncio.sleep(0.3)
        for keys in ([key], [], [other]):
            await asyncio.to_thread(tell, keys)
            await until(lambda keys=keys: router.cluster.in_step(ME) == {k.transfer_id: k.epoch for k in keys})
        assert vitals.news.told == ((other.transfer_id, 1),)


@in_event_loop
async def test_a_dead_model_thread_ends_the_pulses_and_its_last_word_names_the_step() -> None:
    heard: list[tuple[str, Any]] = []
    alive = [True]
    async with Router.open("tcp://127.0.0.1:0", KEYS) as router:
        router.lost = lambda incarnation, reason, in_step: heard.append((reason, in_step))  # type: ignore[method-assign]
        async with registered(router.endpoint, is_sound=lambda: alive[0]) as (_, vitals):
            await asyncio.to_thread(vitals.news.tell, [AttemptKey("t" * 32, 3)])
            alive[0] = False
        await until(lambda: heard)
    assert heard == [("its model thread died", {"t" * 32: 3})]


@in_event_loop
async def test_a_worker_that_leaves_in_good_order_is_charged_to_nobody() -> None:
    heard: list[tuple[str, Any]] = []
    async with Router.open("tcp://127.0.0.1:0", KEYS) as router:
        router.lost = lambda incarnation, reason, in_step: heard.append((reason, in_step))  # type: ignore[method-assign]
        async with registered(router.endpoint) as (_, vitals):
            await asyncio.to_thread(vitals.news.tell, [AttemptKey("t" * 32, 3)])
            await until(lambda: router.cluster.in_step(ME))
        await until(lambda: heard)
    assert heard == [("it left", {})]


@in_event_loop
async def test_pulses_leave_no_thread_and_no_descriptor() -> None:
    import os

    async def once() -> None:
        async with Router.open("tcp://127.0.0.1:0", KEYS) as router, registered(router.endpoint):
            await asyncio.sleep(0.05)

    await once()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    await once()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
