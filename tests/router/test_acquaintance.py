"""Which workers are told of each other ahead of any request: those that share a purpose, and no worker of others."""

from __future__ import annotations

import pytest
from support.cluster.fake_worker import FakeWorker
from support.cluster.router_stage import Stage, run, stage
from support.event_loop import until

from disagg.router import introductions
from disagg.transceiver.wire.purposes import RECEIVES, SENDS


async def add(s: Stage, worker_id: str, role: str) -> FakeWorker:
    """A worker of this version, which names its purposes."""
    return await s.add(worker_id, role, sends=SENDS[role], receives=RECEIVES[role])


def test_workers_that_share_a_purpose_meet_in_both_directions() -> None:
    async def scenario() -> None:
        async with stage() as s:
            p0, d0 = await add(s, "p0", "prefill"), await add(s, "d0", "decode")
            p1, b0 = await add(s, "p1", "prefill"), await add(s, "b0", "both")
            everybody = {"p0", "d0", "p1", "b0"}
            for worker in (p0, d0, p1, b0):
                others = everybody - {worker.register.worker_id}
                await until(lambda worker=worker, others=others: set(worker.links) == others)

    run(scenario)


def test_a_worker_of_the_minor_before_meets_others_for_handoffs_alone() -> None:
    async def scenario() -> None:
        async with stage() as s:
            old_prefill, old_decode = await s.add("p0", "prefill"), await s.add("d0", "decode")
            await s.add("b0", "both")
            prefill, decode = await add(s, "p1", "prefill"), await add(s, "d1", "decode")
            await until(lambda: set(old_decode.links) == {"p0", "p1"})
            await until(lambda: set(decode.links) == {"p0", "p1"})
            await until(lambda: set(prefill.links) == {"d1"})
            assert old_prefill.links == ()
            told = {worker["id"]: (worker["sends"], worker["receives"]) for worker in s.router.workers()}
            assert told["p0"] == (["handoff"], [])
            assert told["d0"] == ([], ["handoff"])

    run(scenario)


def test_in_a_large_fleet_only_handoffs_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introductions, "MAX_ACQUAINTED", 1)

    async def scenario() -> None:
        async with stage() as s:
            prefill, decode = await add(s, "p0", "prefill"), await add(s, "d0", "decode")
            await until(lambda: decode.links == ("p0",))
            assert prefill.links == ()

    run(scenario)


def test_a_source_that_is_lost_is_no_peer_of_its_sinks_any_more() -> None:
    async def scenario() -> None:
        async with stage() as s:
            prefill = await add(s, "p0", "prefill")
            async with FakeWorker.open(
                s.router.endpoint, s.router._keys, "d0", "decode", sends=SENDS["decode"], receives=RECEIVES["decode"]
            ):
                await until(lambda: prefill.links == ("d0",))
            await until(lambda: prefill.links == ())

    run(scenario)
