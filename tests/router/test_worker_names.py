"""Two workers of one name at a router, over real sockets: a mistake is refused, a restart gets in."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from support.cluster.fake_worker import FakeWorker, Rejected
from support.event_loop import in_event_loop, within

from disagg.router.router import Router
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.router import LEAVING, Lease
from disagg.transceiver.wire.timing import LOST_S

KEYS = ClusterKeys.from_secret(b"a secret of the tests, long enough")


@in_event_loop
async def test_a_second_live_worker_of_a_name_is_refused_and_the_first_goes_on() -> None:
    async with (
        Router.open("tcp://127.0.0.1:0", KEYS) as router,
        FakeWorker.open(router.endpoint, KEYS, "p0", "prefill", incarnation="first"),
    ):
        for number in range(2):
            with pytest.raises(Rejected, match="worker_id") as refused:
                async with FakeWorker.open(router.endpoint, KEYS, "p0", "prefill", incarnation=f"more-{number}"):
                    pass
            assert "pid 4711 on testhost" in refused.value.refused.ours
        assert [worker["incarnation"] for worker in router.workers()] == ["first"]
        router.check_invariants()


@in_event_loop
async def test_a_killed_worker_s_restart_gets_in_within_a_second() -> None:
    async with Router.open("tcp://127.0.0.1:0", KEYS) as router:
        async with FakeWorker.open(router.endpoint, KEYS, "p0", "prefill", incarnation="first"):
            pass  # its socket closes without a word
        began_at = time.monotonic()
        async with FakeWorker.open(router.endpoint, KEYS, "p0", "prefill", incarnation="second"):
            assert time.monotonic() - began_at < LOST_S  # a round trip: nothing waits for silence
            assert [worker["incarnation"] for worker in router.workers()] == ["second"]
            router.check_invariants()


@in_event_loop
async def test_a_worker_that_stands_still_gives_its_name_to_a_restart_within_two_seconds() -> None:
    async with Router.open("tcp://127.0.0.1:0", KEYS) as router, contextlib.AsyncExitStack() as workers:
        first = await workers.enter_async_context(
            FakeWorker.open(router.endpoint, KEYS, "p0", "prefill", incarnation="first")
        )
        first.stop_leases()
        opened = FakeWorker.open(router.endpoint, KEYS, "p0", "prefill", incarnation="second")
        await within(workers.enter_async_context(opened), 3.0)
        assert [worker["incarnation"] for worker in router.workers()] == ["second"]
        await asyncio.sleep(0)


@in_event_loop
async def test_another_connection_cannot_speak_as_a_registered_worker() -> None:
    """REGISTER said again, or a lease that says LEAVING: both are of another process, and change nothing."""
    async with (
        Router.open("tcp://127.0.0.1:0", KEYS) as router,
        FakeWorker.open(router.endpoint, KEYS, "p0", "prefill", incarnation="first") as first,
        FakeWorker.open(router.endpoint, KEYS, "d0", "decode", incarnation="other") as other,
    ):
        route = router.cluster._route_of["first"]
        await other.say(first.register)
        await other.say(Lease("first", router.cluster.incarnation, state=LEAVING))
        await within(refused(other, 2))
        assert router.cluster._route_of["first"] == route
        assert [worker["incarnation"] for worker in router.workers()] == ["first", "other"]
        assert first.num_refusals == 0
        router.check_invariants()


async def refused(worker: FakeWorker, count: int) -> None:
    while worker.num_refusals < count:  # noqa: ASYNC110  the fake counts what it hears, and has no event
        await asyncio.sleep(0.01)
