"""Requests that wait for their turn at a router over real sockets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from support.cluster.router_harness import make_request
from support.cluster.router_stage import collect, run, stage

from disagg.router.generation import GenerationError
from disagg.router.tenants import TenantLimits
from disagg.transceiver.wire.messages.router import (
    Dispatch,
)
from disagg.transceiver.wire.messages.tokens import Tokens


def test_a_request_waits_its_turn_and_starts_when_a_first_token_makes_room() -> None:
    async def scenario() -> None:
        async with stage(ahead_per_server=1) as s:
            _, decode = await s.pair()
            first = asyncio.create_task(collect(s.router, make_request(request_id="first")))
            dispatched = await decode.expect(Dispatch)
            others = [replace(make_request(request_id=f"p{p}"), priority=p) for p in (5, 0)]
            tasks = [asyncio.create_task(collect(s.router, request)) for request in others]
            await asyncio.sleep(0)
            assert b'disagg_requests_queued{tenant=""} 2.0' in s.router.metrics()
            s.router.check_invariants()
            await decode.say(Tokens(dispatched.transfer_id, dispatched.epoch, 0, (9,)))
            second = await decode.expect(Dispatch)
            assert (second.request_id, second.priority) == ("p0", 0)
            for task in (first, *tasks):
                task.cancel()
            await asyncio.gather(first, *tasks, return_exceptions=True)
            assert s.router.record("p5")["state"] == "cancelled"

    run(scenario)


def test_a_deadline_that_passes_while_a_request_waits_is_504() -> None:
    async def scenario() -> None:
        async with stage(ahead_per_server=1) as s:
            await s.pair()
            first = asyncio.create_task(collect(s.router, make_request()))
            await asyncio.sleep(0)
            with pytest.raises(GenerationError, match="while it waited") as caught:
                await collect(s.router, replace(make_request(request_id="late"), timeout_s=0.2))
            assert caught.value.status == 504
            assert s.router.record("late")["status"] == 504
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)

    run(scenario)


def test_a_key_s_limit_is_429_for_it_and_nothing_for_another() -> None:
    async def scenario() -> None:
        async with stage(tenants={"one": TenantLimits(max_requests=1)}) as s:
            await s.pair()
            mine = replace(make_request(), tenant="one")
            first = asyncio.create_task(collect(s.router, mine))
            await asyncio.sleep(0)
            with pytest.raises(GenerationError, match="requests are in flight") as caught:
                await collect(s.router, mine)
            assert (caught.value.status, caught.value.retry_after_s) == (429, 1.0)
            assert b'disagg_requests_refused_total{status="429",tenant="one"} 1.0' in s.router.metrics()
            other = asyncio.create_task(collect(s.router, replace(mine, tenant="two")))
            await asyncio.sleep(0)
            assert not other.done()
            for task in (first, other):
                task.cancel()
            await asyncio.gather(first, other, return_exceptions=True)

    run(scenario)
