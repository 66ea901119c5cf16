"""Tokens from real sockets through the router: credit comes back, slow clients slow only themselves, none is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from support.cluster.fake_worker import FakeWorker
from support.cluster.router_harness import GEOMETRY, IDENTITY, ListPlacer, make_attempts, make_register, make_request
from support.event_loop import in_event_loop, within

from disagg.router.attempt_events import Answered, Emit
from disagg.router.generation import TokenChunk
from disagg.router.router import Router
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.router import (
    Dispatch,
    Finished,
    Lease,
)
from disagg.transceiver.wire.messages.tokens import TOKENS_WINDOW, Tokens
from disagg.transceiver.wire.messages.values import TokenLogprobs
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.sockets import Sockets
from disagg.worker.router_link import RouterLink

KEYS = ClusterKeys.published()
MANY = 20 * TOKENS_WINDOW


async def take(router: Router, max_tokens: int, request_id: str, begun: asyncio.Event | None = None) -> list[int]:
    """The token ids of one answer; `begun` is waited for after its first item."""
    found: list[int] = []
    async for item in router.generate(make_request(max_tokens, request_id)):
        if isinstance(item, TokenChunk):
            found.extend(item.token_ids)
        if begun is not None:
            await begun.wait()
    return found


@contextlib.asynccontextmanager
async def a_worker(router: Router, holds: list[bool]) -> AsyncIterator[RouterLink]:
    """A worker's own link, without an engine behind it."""
    sockets, node = Sockets(KEYS), Node("w" * 32, "both", IDENTITY, GEOMETRY, KEYS)
    register = make_register("both", "both", incarnation=node.incarnation)
    opened = RouterLink.open(
        router.endpoint,
        node,
        sockets,
        register,
        lambda incarnation: Lease(node.incarnation, incarnation),
        on_hold=holds.append,
    )
    try:
        async with opened as link:
            keeping = asyncio.create_task(link.keep())
            try:
                yield link
                assert not keeping.done()
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
    finally:
        sockets.close()


async def emit(link: RouterLink, dispatch: Dispatch, hearing: asyncio.Task[object]) -> None:
    """One token per turn of the loop, as fast as it goes; credit is heard meanwhile."""
    for index in range(dispatch.sampling.max_tokens):
        link.send(Tokens(dispatch.transfer_id, dispatch.epoch, index, (index,)))
        await asyncio.sleep(0)
    link.send(Finished(dispatch.transfer_id, dispatch.epoch, dispatch.sampling.max_tokens, "length"))
    assert not hearing.done()


@in_event_loop
async def test_a_worker_that_emits_far_more_than_its_credit_loses_no_token_and_stays_registered() -> None:
    async with Router.open("tcp://127.0.0.1:0", KEYS) as router, a_worker(router, []) as link:
        answer = asyncio.create_task(take(router, MANY, "r"))
        dispatch = await within(link.next_message())
        assert isinstance(dispatch, Dispatch)
        hearing = asyncio.create_task(link.next_message())
        await emit(link, dispatch, hearing)
        assert await within(answer, 20) == list(range(MANY))
        assert len(router.workers()) == 1
        hearing.cancel()


@in_event_loop
async def test_without_credit_tokens_stay_with_the_worker_whose_leases_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of credit: a router that raises it never takes one window and no more."""
    async with Router.open("tcp://127.0.0.1:0", KEYS) as router, a_worker(router, []) as link:
        monkeypatch.setattr("disagg.router.cluster.TokenCredit", lambda limit: Lease(*[router.cluster.incarnation] * 2))
        answer = asyncio.create_task(take(router, MANY, "r"))
        dispatch = await within(link.next_message())
        assert isinstance(dispatch, Dispatch)
        hearing = asyncio.create_task(link.next_message())
        await emit(link, dispatch, hearing)
        await asyncio.sleep(0.2)
        assert link.tokens.num_waiting > MANY // 2
        link.renew()
        await link.flushed()
        assert len(router.workers()) == 1
        answer.cancel()
        hearing.cancel()
        await asyncio.gather(answer, hearing, return_exceptions=True)


@in_event_loop
async def test_a_client_that_reads_slowly_delays_no_other_and_gets_every_token() -> None:
    async with (
        Router.open("tcp://127.0.0.1:0", KEYS) as router,
        FakeWorker.open(router.endpoint, KEYS, "b", "both") as worker,
    ):
        begun = asyncio.Event()
        slow = asyncio.create_task(take(router, MANY, "slow", begun))
        first = await worker.expect(Dispatch)
        quick = asyncio.create_task(take(router, MANY, "quick"))
        second = await worker.expect(Dispatch)
        for dispatch in (first, second):
            await worker.answer(dispatch, *range(MANY))
        assert await within(quick) == list(range(MANY))
        assert not slow.done()
        begun.set()
        assert await within(slow) == list(range(MANY))


@pytest.mark.parametrize("source", ["d0", "p0", "other"])
@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("logprobs", [(), (TokenLogprobs(-1.0),), (TokenLogprobs(-1.0),) * 2])
@pytest.mark.parametrize("token_ids", [(), (7,), (7, 8), (1,) * 9])
def test_the_short_way_emits_what_the_long_way_would_or_leaves_it_to_that(
    source: str, epoch: int, index: int, logprobs: tuple[TokenLogprobs, ...], token_ids: tuple[int, ...]
) -> None:
    rows = Tokens("t" * 32, epoch, index, token_ids, logprobs)
    results = []
    for is_short in (True, False):
        request = make_attempts(ListPlacer(["p0"], ["d0"]), max_tokens=6)
        request.start(0.0)
        request.handle(Answered("d0", Tokens("t" * 32, 1, 0, (5, 6))), 0.1)
        chunk = request.next_chunk(source, rows, 0.2) if is_short else None
        actions = [Emit(chunk)] if chunk is not None else request.handle(Answered(source, rows), 0.2)
        results.append((actions, request.num_tokens, request.record.num_tokens, request.is_over))
        request.check_invariants()
    assert results[0] == results[1]
