"""The shell over real sockets: workers that come, serve, fail and die, seen from where HTTP sits."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from support.cluster.fake_worker import FakeWorker, Rejected
from support.cluster.router_harness import GEOMETRY, IDENTITY, make_request
from support.cluster.router_stage import KEYS, collect, run, stage
from support.event_loop import until

from disagg.router.generation import GenerationEnd, GenerationError, TokenChunk
from disagg.transceiver.wire.messages.router import (
    CancelRequest,
    Dispatch,
    Finished,
    PrefillLocally,
    RequestFailed,
    Retarget,
    TransferFailure,
    TransferReport,
)
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.messages.values import GroupBytes, MetricSample, StageTimes
from disagg.transceiver.wire.ticket import check


def test_a_request_goes_to_both_workers_and_its_tokens_come_back() -> None:
    async def scenario() -> None:
        async with stage() as s:
            prefill, decode = await s.pair()
            request = make_request(max_tokens=3)
            answer = asyncio.create_task(collect(s.router, request))
            source, sink = await prefill.expect(Dispatch), await decode.expect(Dispatch)
            assert (source.mode, sink.mode) == ("prefill", "decode")
            assert source.prompt == sink.prompt == request.prompt
            check(
                KEYS.ticket,
                sink.ticket,
                transfer_id=sink.transfer_id,
                epoch=1,
                prefill="p0",
                decode="d0",
                prompt=request.prompt,
                ttl_s=source.deadline_s,
            )
            await decode.answer(sink, 11, 12, 13)
            assert await answer == ([11, 12, 13], GenerationEnd("length"))
            assert prefill.has_no_orders()

    run(scenario)


def test_the_record_tells_attempts_bytes_and_a_timeline_that_sums_to_ttft() -> None:
    async def scenario() -> None:
        async with stage() as s:
            prefill, decode = await s.pair()
            answer = asyncio.create_task(collect(s.router, make_request(max_tokens=3)))
            dispatch = await decode.expect(Dispatch)
            await asyncio.sleep(0.05)
            groups = (GroupBytes(0, "full", 2, 200, 2, 200), GroupBytes(1, "window-64", 1, 50, 2, 100))
            times = StageTimes((("queue", 0.001), ("transfer_wait", 0.02), ("wire", 0.004), ("verify", 99.0)))
            key = (dispatch.transfer_id, dispatch.epoch)
            await decode.say(TransferReport(*key, "d0", "shm", groups, times, 3))
            await decode.answer(dispatch, 1, 2)
            await answer
            await prefill.say(TransferReport(*key, "p0", "", (), StageTimes((("prefill", 0.011),))))
            await until(lambda: "p0" in s.router.record("req-1")["attempts"][0]["stages"])  # type: ignore[index]
            record = s.router.record("req-1")
            assert record is not None
            timeline = record["timeline"]
            assert sum(timeline.values()) == pytest.approx(record["ttft_s"])
            assert timeline["queue"] == pytest.approx(0.001)
            assert timeline["prefill"] == pytest.approx(0.010)
            assert timeline["transfer_wait"] == pytest.approx(0.010)
            assert timeline["wire"] == pytest.approx(0.004)
            assert timeline["first_token"] == 0.0
            assert (record["state"], record["output_tokens"], record["prompt_tokens"]) == ("finished", 2, 5)
            assert record["transfer"]["nbytes"] == 250
            assert record["transfer"]["full_copy_nbytes"] == 300
            assert [group["num_blocks"] for group in record["transfer"]["groups"]] == [2, 1]
            assert [attempt["outcome"] for attempt in record["attempts"]] == ["finished"]
            assert s.router.record(dispatch.transfer_id) == record
            assert s.router.record("unknown") is None

    run(scenario)


def test_a_client_that_goes_away_cancels_at_both_workers() -> None:
    async def scenario() -> None:
        async with stage() as s:
            prefill, decode = await s.pair()
            stream = s.router.generate(make_request())
            first = asyncio.ensure_future(anext(stream))
            dispatch = await decode.expect(Dispatch)
            await prefill.expect(Dispatch)
            await decode.say(Tokens(dispatch.transfer_id, 1, 0, (5,)))
            assert await first == TokenChunk(0, (5,))
            await stream.aclose()
            assert (await prefill.expect(CancelRequest)).transfer_id == dispatch.transfer_id
            assert (await decode.expect(CancelRequest)).transfer_id == dispatch.transfer_id
            assert s.router.record("req-1")["state"] == "cancelled"  # type: ignore[index]

    run(scenario)


def test_cancelling_the_task_that_waits_for_the_first_token_cancels_at_both_workers() -> None:
    async def scenario() -> None:
        async with stage() as s:
            prefill, decode = await s.pair()
            answer = asyncio.create_task(collect(s.router, make_request()))
            await prefill.expect(Dispatch)
            await decode.expect(Dispatch)
            answer.cancel()
            await prefill.expect(CancelRequest)
            await decode.expect(CancelRequest)
            with pytest.raises(asyncio.CancelledError):
                await answer

    run(scenario)


def test_a_decode_worker_that_dies_is_replaced_within_five_seconds() -> None:
    async def scenario() -> None:
        async with stage() as s:
            prefill = await s.add("p0", "prefill")
            async with FakeWorker.open(s.router.endpoint, KEYS, "d0", "decode") as dying:
                await until(s.router.is_ready)
                answer = asyncio.create_task(collect(s.router, make_request(max_tokens=2)))
                await dying.expect(Dispatch)
                assert (await prefill.expect(Dispatch)).epoch == 1
                heir = await s.add("d1", "decode")
                await until(lambda: heir.links)
            died_at = time.monotonic()
            dispatch = await heir.expect(Dispatch)
            assert time.monotonic() - died_at < 5.0
            assert dispatch.epoch == 2
            assert (await prefill.expect(CancelRequest)).epoch == 1
            assert (await prefill.expect(Dispatch)).epoch == 2
            await heir.answer(dispatch, 7, 8)
            assert (await answer)[0] == [7, 8]
            attempts = s.router.record("req-1")["attempts"]  # type: ignore[index]
            assert [attempt["decode"] for attempt in attempts] == ["d0", "d1"]
            assert "`d0` was lost" in attempts[0]["outcome"]

    run(scenario)


def test_a_decode_worker_that_dies_after_a_token_is_an_error_never_an_end() -> None:
    async def scenario() -> None:
        async with stage() as s:
            await s.add("p0", "prefill")
            async with FakeWorker.open(s.router.endpoint, KEYS, "d0", "decode") as dying:
                await until(s.router.is_ready)
                stream = s.router.generate(make_request())
                first = asyncio.ensure_future(anext(stream))
                dispatch = await dying.expect(Dispatch)
                await dying.say(Tokens(dispatch.transfer_id, 1, 0, (5,)))
                await first
            with pytest.raises(GenerationError) as caught:
                async with asyncio.timeout(5.0):
                    await anext(stream)
            assert caught.value.status == 502

    run(scenario)


def test_a_failed_transfer_is_retargeted_then_computed_locally() -> None:
    async def scenario() -> None:
        async with stage() as s:
            prefills = {"p0": await s.add("p0", "prefill"), "p1": await s.add("p1", "prefill")}
            decode = await s.add("d0", "decode")
            await until(lambda: len(decode.links) == 2 and s.router.is_ready())
            answer = asyncio.create_task(collect(s.router, make_request(max_tokens=1 + 1)))
            dispatch = await decode.expect(Dispatch)
            await decode.say(TransferFailure(dispatch.transfer_id, 1, "digest"))
            retarget = await decode.expect(Retarget)
            assert dispatch.peer is not None
            assert {dispatch.peer.incarnation, retarget.peer.incarnation} == {"p0", "p1"}
            again = await prefills[retarget.peer.incarnation].expect(Dispatch)
            assert (again.epoch, again.ticket) == (2, retarget.ticket)
            await decode.say(TransferFailure(dispatch.transfer_id, 2, "digest"))
            local = await decode.expect(PrefillLocally)
            await decode.answer(replace(dispatch, epoch=local.epoch), 3, 4)
            assert (await answer)[0] == [3, 4]

    run(scenario)


@pytest.mark.parametrize("status", [400, 500])
def test_a_worker_s_error_is_the_client_s_error(status: int) -> None:
    async def scenario() -> None:
        async with stage() as s:
            prefill, decode = await s.pair()
            answer = asyncio.create_task(collect(s.router, make_request()))
            dispatch = await prefill.expect(Dispatch)
            await decode.expect(Dispatch)
            await prefill.say(RequestFailed(dispatch.transfer_id, 1, status, "the reason"))
            with pytest.raises(GenerationError, match="the reason") as caught:
                await answer
            assert caught.value.status == status
            await decode.expect(CancelRequest)

    run(scenario)


def test_without_workers_a_request_is_503_with_a_reason_and_retry_after() -> None:
    async def scenario() -> None:
        async with stage() as s:
            assert not s.router.is_ready()
            assert s.router.max_model_len() is None
            with pytest.raises(GenerationError, match="no prefill worker") as caught:
                await collect(s.router, make_request())
            assert caught.value.status == 503
            assert caught.value.retry_after_s is not None
            await s.pair()
            assert s.router.max_model_len() == IDENTITY.max_model_len

    run(scenario)


def test_requests_beyond_the_queue_bound_are_503() -> None:
    async def scenario() -> None:
        async with stage(max_queued=2) as s:
            await s.pair()
            waiting = [asyncio.create_task(collect(s.router, make_request(request_id=f"r{i}"))) for i in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(GenerationError, match="2 requests waiting") as caught:
                await collect(s.router, make_request())
            assert (caught.value.status, caught.value.retry_after_s) == (503, 1.0)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    run(scenario)


def test_the_deadline_is_504_and_cancels() -> None:
    async def scenario() -> None:
        async with stage(request_timeout_s=0.3) as s:
            _, decode = await s.pair()
            answer = asyncio.create_task(collect(s.router, make_request()))
            assert (await decode.expect(Dispatch)).deadline_s == pytest.approx(0.3, abs=0.1)
            with pytest.raises(GenerationError) as caught:
                await answer
            assert caught.value.status == 504
            await decode.expect(CancelRequest)

    run(scenario)


def test_a_worker_of_another_identity_is_refused_by_field() -> None:
    async def scenario() -> None:
        async with stage(expected_fingerprint=IDENTITY.model_fingerprint) as s:
            await s.add("p0", "prefill")
            for field, value in {"model_fingerprint": "0" * 32, "compute_dtype": "bfloat16"}.items():
                with pytest.raises(Rejected) as caught:
                    await s.add("d0", "decode", identity=replace(IDENTITY, **{field: value}))  # type: ignore[arg-type]
                assert (caught.value.refused.field, caught.value.refused.theirs) == (field, value)
            assert [worker["id"] for worker in s.router.workers()] == ["p0"]

    run(scenario)


def test_a_pair_of_other_geometry_is_never_scheduled_and_workers_says_why() -> None:
    async def scenario() -> None:
        async with stage() as s:
            await s.add("p0", "prefill")
            decode = await s.add("d0", "decode", geometry=replace(GEOMETRY, block_size=24))
            with pytest.raises(GenerationError, match="block_size"):
                await collect(s.router, make_request())
            assert decode.links == ()
            found = {worker["id"]: worker["incompatible"] for worker in s.router.workers()}
            assert found["d0"] == [{"worker": "p0", "field": "block_size", "prefill": "16", "decode": "24"}]
            assert found["p0"] == [{"worker": "d0", "field": "block_size", "prefill": "16", "decode": "24"}]

    run(scenario)


def test_workers_tells_state_blocks_and_links() -> None:
    async def scenario() -> None:
        async with stage() as s:
            await s.pair()
            await until(lambda: all(worker["blocks"] for worker in s.router.workers()))
            prefill, decode = s.router.workers()
            assert (prefill["id"], prefill["role"], prefill["state"], prefill["pid"]) == (
                "p0",
                "prefill",
                "ready",
                4711,
            )
            assert decode["blocks"] == [
                {"pool": 0, "used": 3, "free": 59, "slots": 64},
                {"pool": 1, "used": 1, "free": 29, "slots": 32},
            ]
            (link,) = decode["links"]
            assert (link["worker"], link["plane"], link["state"], link["gb_per_s"]) == ("p0", "shm", "ready", 3.5)
            assert decode["identity"]["model_fingerprint"] == IDENTITY.model_fingerprint

    run(scenario)


def test_a_worker_that_holds_an_ended_request_is_told_to_drop_it() -> None:
    async def scenario() -> None:
        async with stage() as s:
            _, decode = await s.pair()
            decode.holding = (("dead" * 8, 3),)
            await decode.renew()
            cancel = await decode.expect(CancelRequest)
            assert (cancel.transfer_id, cancel.epoch) == ("dead" * 8, 3)

    run(scenario)


def test_a_lease_of_an_unknown_incarnation_is_told_to_register_anew() -> None:
    async def scenario() -> None:
        async with stage() as s:
            worker = await s.add("p0", "prefill", incarnation="first")
            await s.add("d0", "decode")
            worker.register = replace(worker.register, incarnation="other")
            await worker.renew()
            await until(lambda: worker.num_refusals)
            assert [w["incarnation"] for w in s.router.workers()] == ["first", "d0"]

    run(scenario)


def test_a_closing_router_ends_streams_with_an_error() -> None:
    async def scenario() -> None:
        async with stage() as s:
            _, decode = await s.pair()
            answer = asyncio.create_task(collect(s.router, make_request()))
            await decode.expect(Dispatch)
            s.router.shut_down()
            with pytest.raises(GenerationError, match="shutting down") as caught:
                await answer
            assert caught.value.status == 503
            with pytest.raises(GenerationError, match="shutting down"):
                await collect(s.router, make_request())

    run(scenario)


def test_a_request_that_no_message_can_carry_ends_alone() -> None:
    async def scenario() -> None:
        async with stage() as s:
            _, decode = await s.pair()
            too_large = replace(make_request(), prompt=(2**40,) * (2 << 20))
            with pytest.raises(GenerationError, match="cannot be sent") as caught:
                await collect(s.router, too_large)
            assert caught.value.status == 400
            answer = asyncio.create_task(collect(s.router, make_request(request_id="next")))
            while (dispatch := await decode.expect(object)) and not isinstance(dispatch, Dispatch):
                pass
            await decode.answer(dispatch, 1)
            assert (await answer)[0] == [1]

    run(scenario)


def test_metrics_carry_the_router_s_figures_and_every_worker_s() -> None:
    async def scenario() -> None:
        async with stage() as s:
            _, decode = await s.pair()
            labels = (("plane", "shm"), ("group", "full"), ("outcome", "verified"))
            decode.metrics = (
                MetricSample("disagg_transfer_bytes_total", "counter", labels, 4096.0),
                MetricSample("disagg_requests_running", "gauge", (), 1.0),
            )
            await decode.renew()
            answer = asyncio.create_task(collect(s.router, make_request(max_tokens=3)))
            await decode.answer(await decode.expect(Dispatch), 1, 2, 3)
            await answer
            text = s.router.metrics().decode()
            lines = text.splitlines()
            for line in (
                'disagg_transfer_bytes_total{group="full",outcome="verified",plane="shm",worker="d0"} 4096.0',
                'disagg_kv_blocks_used{pool="1",worker="d0"} 1.0',
                'disagg_worker_requests_running{worker="d0"} 1.0',
                'disagg_requests_total{outcome="finished"} 1.0',
                "disagg_requests_running 0.0",
                "disagg_time_to_first_token_seconds_count 1.0",
                "disagg_inter_token_latency_seconds_count 2.0",
                "disagg_e2e_request_latency_seconds_count 1.0",
            ):
                assert line in lines
            assert "_created" not in text
            assert text == s.router.metrics().decode()

    run(scenario)


def test_an_answer_goes_on_at_another_worker_under_a_ticket_for_all_its_tokens_and_is_counted() -> None:
    async def scenario() -> None:
        async with stage() as s:
            await s.add("p0", "prefill", sends=("handoff",))
            async with FakeWorker.open(s.router.endpoint, KEYS, "d0", "decode", sends=()) as first:
                await until(s.router.is_ready)
                answer = asyncio.create_task(collect(s.router, make_request(max_tokens=9)))
                dispatch = await first.expect(Dispatch)
                await first.say(Tokens(dispatch.transfer_id, dispatch.epoch, 0, (5, 6)))
                await until(lambda: s.router.record("req-1")["output_tokens"])  # type: ignore[index]
                second = await s.add("d1", "decode", sends=())
                await until(lambda: any(w["id"] == "d1" and w["links"] for w in s.router.workers()))
            again = await second.expect(Dispatch)
            assert (again.prompt, again.first_output, again.mode) == (dispatch.prompt, (5, 6), "decode")
            claims = {"prefill": "p0", "decode": "d1", "prompt": again.prompt, "ttl_s": again.deadline_s}
            names = {"transfer_id": again.transfer_id, "epoch": 2}
            check(KEYS.ticket, again.ticket, **names, **claims, output=(5, 6))  # type: ignore[arg-type]
            await second.say(Tokens(again.transfer_id, 2, 2, (7,)))
            await second.say(Finished(again.transfer_id, 2, 3, "stop", 7))
            assert await answer == ([5, 6, 7], GenerationEnd("stop", 7))
            text = s.router.metrics().decode()
            assert "disagg_continuations_total 1.0" in text
            assert "disagg_continuations_inexact_total 0.0" in text
            assert "disagg_continuation_gap_seconds_count 1.0" in text

    run(scenario)
