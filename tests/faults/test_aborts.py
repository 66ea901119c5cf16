"""Requests that are given up at any moment, by anybody: thousands at the cores, hundreds through the shells."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from support.links.lossy_link import LossyLink
from support.links.shell_pair import ShellTrio
from support.links.transfer_pair import COMPUTE_ID, DEADLINE_S, TransferPair, needed_of

from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.protocol.events import CancelAsked, ComputeFailed, FinishedEarly, PeerGone, SoftDropped
from disagg.transceiver.protocol.state import State
from disagg.transceiver.wire.timing import LEASE_S

END_S = DEADLINE_S + 3 * LEASE_S
BATCH = 500
NUM_BATCHES, NUM_BATCHES_IN_CI = 20, 2


def run_one(seed: int) -> TransferPair:
    """A transfer of random pace over a random link, given up at a random moment by a random party."""
    rng = random.Random(seed)
    rough = LossyLink(seed, drop=0.2, duplicate=0.2, truncate=0.05, jitter_s=0.3)
    pair = TransferPair(plane=rng.choice(["shm", "zmq"]), link=rng.choice([LossyLink(seed), rough]))
    units = needed_of()
    cuts = sorted(rng.sample(range(len(units) + 1), 2))
    steps = [
        pair.reserve,
        lambda: pair.compute(units[: cuts[0]]),
        lambda: pair.compute(units[cuts[0] : cuts[1]]),
        lambda: pair.compute(units[cuts[1] :]),
        pair.finish_prompt,
    ]
    abort_at, moment = rng.randrange(len(steps) + 3), rng.choice([0.0, 0.05, 0.4, 3.0])
    for number in range(len(steps) + 3):
        if number == abort_at:
            abort(pair, rng)
        if number < len(steps):
            steps[number]()
        if pair.is_pin_wanted and pair.sender.state is State.PINNING and rng.random() < 0.7:
            pair.pin()
        while rng.random() < 0.8 and pair.deliver_one():
            if pair.jobs and rng.random() < 0.5:
                pair.land_one()
        pair.advance(pair.now + moment * rng.random())
    pair.advance(END_S)
    return pair


def abort(pair: TransferPair, rng: random.Random) -> None:
    sender, receiver = pair.sender, pair.receiver
    end, event = rng.choice(
        [
            (sender, CancelAsked("cancelled")),
            (receiver, CancelAsked("cancelled")),
            (sender, PeerGone("lost")),
            (receiver, PeerGone("lost")),
            (sender, ComputeFailed("non-finite")),
            (sender, FinishedEarly(COMPUTE_ID)),
            (sender, SoftDropped(COMPUTE_ID)),
        ]
    )
    is_legal = not isinstance(event, FinishedEarly | ComputeFailed | SoftDropped) or end.state in (
        State.WAITING,
        State.PINNING,
    )
    if is_legal:
        pair.feed(end, event)
    if rng.random() < 0.3:  # and the others hear of it too, as from a router
        pair.feed(sender, CancelAsked("cancelled"))
        pair.feed(receiver, CancelAsked("cancelled"))


def batches() -> list[object]:
    return [
        pytest.param(number, marks=[pytest.mark.slow] if number >= NUM_BATCHES_IN_CI else [])
        for number in range(NUM_BATCHES)
    ]


@pytest.mark.parametrize("batch", batches())
def test_of_ten_thousand_aborted_transfers_none_keeps_a_source_or_a_reservation(batch: int) -> None:
    num_verified = 0
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        pair = run_one(seed)
        pair.check_invariants()
        assert pair.sender.is_over, seed
        assert pair.receiver.is_over, seed
        num_verified += isinstance(pair.verdicts[0], Verified)
    assert 0 < num_verified < BATCH, "aborts come both too early and too late"


async def storm(trio: ShellTrio, seed: int, num_requests: int, concurrency: int) -> int:
    """Clients that leave after a random time; returns how many left before their answer."""
    rng = random.Random(seed)
    seats = asyncio.Semaphore(concurrency)
    num_gone = 0

    async def one() -> None:
        nonlocal num_gone
        async with seats:
            client = trio.begin()
            done, _ = await asyncio.wait({client}, timeout=rng.expovariate(1 / 0.03))
            if not done:
                client.cancel()
                num_gone += 1
                await asyncio.wait({client})
            elif client.result().kind != "answer":
                raise AssertionError(client.result())

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_requests):
            tasks.create_task(one())
    await trio.settle()
    trio.check()
    assert (await trio.ask()).kind == "answer"
    await trio.settle()
    return num_gone


@pytest.mark.parametrize(
    ("plane", "scale", "num_requests"),
    [
        ("shm", 0.2, 60),
        pytest.param("shm", 1.0, 300, marks=pytest.mark.slow),
        pytest.param("zmq", 1.0, 300, marks=pytest.mark.slow),
    ],
)
def test_hundreds_of_clients_that_leave_leave_nothing_behind(arena: Any, num_requests: int) -> None:
    num_gone = arena.run(lambda trio: storm(trio, 1, num_requests, 6))
    assert num_gone > num_requests // 10
