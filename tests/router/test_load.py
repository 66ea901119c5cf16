"""A real router under load, with workers that have no model (`disagg.bench.fleet`) on real sockets, in true time."""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from support.event_loop import in_event_loop, within

from disagg.bench.fleet import KEYS, FakeFleet
from disagg.router.generation import GenerationRequest, TokenChunk
from disagg.router.router import Router, RouterOptions
from disagg.transceiver.wire.messages.values import Sampling
from disagg.transceiver.wire.node import draw_id

pytestmark = pytest.mark.processes

STEP_S = 0.002
SEATS = 4


@contextlib.asynccontextmanager
async def routed(
    *, step_s: float = STEP_S, num_seats: int = 512, roles: tuple[str, ...] = ("both",), options: RouterOptions
) -> AsyncIterator[tuple[Router, FakeFleet]]:
    async with Router.open("tcp://127.0.0.1:0", KEYS, options) as router:
        fleet = FakeFleet(router.endpoint, step_s, num_seats=num_seats)
        await within(fleet.register(*roles), 10)
        try:
            yield router, fleet
            router.check_invariants()
        finally:
            await fleet.close()


async def answer(router: Router, max_tokens: int, tenant: str = "") -> int:
    request = GenerationRequest(draw_id(), array("i", [1] * 8), Sampling(max_tokens=max_tokens), tenant=tenant)
    return sum([len(item.token_ids) async for item in router.generate(request) if isinstance(item, TokenChunk)])


@in_event_loop
async def test_a_worker_asked_for_more_than_the_router_carries_is_slowed_stays_registered_and_loses_nothing() -> None:
    """256 answers of a token per 5 ms: 51,200 tokens/s, of which router and worker in one process carry a part."""
    async with routed(step_s=0.005, options=RouterOptions()) as (router, fleet):
        answers = [answer(router, 256) for _ in range(256)]
        assert await within(asyncio.gather(*answers), 25) == [256] * 256
        (worker,) = router.workers()
        assert worker["incarnation"] == fleet.workers[0].node.incarnation, "the same registration as before"


async def tokens_of_two_tenants(seconds: float, names: tuple[str, str]) -> tuple[int, int]:
    """64 clients of one name and 16 of another, each asking anew after its answer: tokens of both after a while."""
    served = Counter[str]()

    async def client(router: Router, place: str, name: str) -> None:
        while True:
            num_tokens = await answer(router, 8, name)
            served[place] += num_tokens

    async with routed(num_seats=SEATS, options=RouterOptions(ahead_per_server=SEATS)) as (router, _):
        clients = [client(router, "many", names[0]) for _ in range(64)] + [
            client(router, "few", names[1]) for _ in range(16)
        ]
        tasks = [asyncio.create_task(each) for each in clients]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return served["many"], served["few"]


@in_event_loop
async def test_two_api_keys_get_equal_shares_whatever_the_number_of_their_clients() -> None:
    many, few = await tokens_of_two_tenants(2.0, ("ann", "ben"))
    assert few > 100
    assert 0.75 < many / few < 1.35


@in_event_loop
async def test_under_one_key_the_clients_share_by_their_number() -> None:
    """The control of the one above: four times the clients, four times the tokens."""
    many, few = await tokens_of_two_tenants(2.0, ("ann", "ann"))
    assert many / few > 2.5
