"""Moves over real sockets: what workers are told when one drains, or says that it is short of blocks."""

from __future__ import annotations

import asyncio

from support.cluster.fake_worker import FakeWorker
from support.cluster.router_harness import make_request
from support.cluster.router_stage import KEYS, Stage, collect, run, stage
from support.event_loop import until

from disagg.router.generation import GenerationEnd
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.messages.router import CancelRequest, Dispatch, Finished, Grant, Resume, TransferFailure
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.purposes import HANDOFF, MOVE

SERVES = {"sends": (HANDOFF, MOVE), "receives": (HANDOFF, MOVE)}


async def two_workers(s: Stage) -> tuple[FakeWorker, FakeWorker, Dispatch, asyncio.Task[object]]:
    """The one that has begun to answer a request, the other, what the first was told, and the client."""
    first, second = await s.add("b0", "both", **SERVES), await s.add("b1", "both", **SERVES)
    await until(s.router.is_ready)
    answer = asyncio.create_task(collect(s.router, make_request(max_tokens=4)))
    await until(lambda: not (first.has_no_orders() and second.has_no_orders()))
    source, sink = (second, first) if first.has_no_orders() else (first, second)
    dispatch = await source.expect(Dispatch)
    await source.say(Tokens(dispatch.transfer_id, 1, 0, (11,)))
    await until(lambda: s.router.record("req-1")["output_tokens"] == 1)  # type: ignore[index]
    return source, sink, dispatch, answer


def test_a_draining_workers_answer_is_granted_to_the_other_and_ends_there() -> None:
    async def scenario() -> None:
        async with stage() as s:
            source, sink, dispatch, answer = await two_workers(s)
            assert s.router.drain(source.register.worker_id)
            grant, moved = await source.expect(Grant), await sink.expect(Dispatch)
            assert (grant.request, grant.num_tokens) == (dispatch.transfer_id, 1)
            assert (moved.mode, moved.first_output) == ("move", (11,))
            ends = source.register.incarnation, sink.register.incarnation
            claims = ticket.move_claims(grant.transfer_id, 2, grant.request, *ends, dispatch.prompt, 1)
            assert ticket.is_leg_ticket(KEYS.ticket, moved.ticket, claims, grant.ttl_s)
            await sink.say(Tokens(moved.transfer_id, 2, 0, (11, 12, 13, 14)))
            assert (await source.expect(CancelRequest)).epoch == 1
            await sink.say(Finished(moved.transfer_id, 2, 4, "length"))
            assert await answer == ([11, 12, 13, 14], GenerationEnd("length"))
            record = s.router.record("req-1")
            assert record is not None
            assert record["moves"] == 1
            assert record["attempts"][1]["pause_s"] > 0
            assert b'disagg_moves_total{outcome="moved"} 1.0' in s.router.metrics()

    run(scenario)


def test_a_failed_move_is_told_to_the_source_which_goes_on() -> None:
    async def scenario() -> None:
        async with stage() as s:
            source, sink, dispatch, answer = await two_workers(s)
            s.router.drain(source.register.worker_id)
            await source.expect(Grant)
            await sink.say(TransferFailure((await sink.expect(Dispatch)).transfer_id, 2, "no room"))
            assert (await source.expect(Resume)).epoch == 3
            assert (await sink.expect(CancelRequest)).epoch == 2
            s.router.drain(source.register.worker_id, draining=False)
            await source.say(Tokens(dispatch.transfer_id, 3, 1, (12, 13, 14)))
            await source.say(Finished(dispatch.transfer_id, 3, 4, "length"))
            assert await answer == ([11, 12, 13, 14], GenerationEnd("length"))

    run(scenario)


def test_a_lease_that_names_a_pressed_answer_moves_it() -> None:
    async def scenario() -> None:
        async with stage() as s:
            source, sink, dispatch, answer = await two_workers(s)
            await source.renew(pressed=((dispatch.transfer_id, 1), ("f" * 32, 7)))
            await source.expect(Grant)
            assert (await sink.expect(Dispatch)).mode == "move"
            answer.cancel()

    run(scenario)
