"""Strangers at every door, and peers that hold the secret and mean harm: they lose their own connections, no more."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import zmq
from support.abuse.aside import aside
from support.abuse.guest import Guests, guests
from support.abuse.honest import Ask
from support.abuse.insider import (
    forms,
    hello,
    next_of,
    registration,
    registration_of,
    say,
    speaking_to,
    worker,
)
from support.abuse.mutants import Change, changes, largest, mutants, pack, packed_form
from support.abuse.pair import Pair
from support.abuse.rogue import rogue
from support.abuse.strangers import knock
from support.abuse.watch import Watch, watching

from disagg.transceiver.wire.codec import encode
from disagg.transceiver.wire.messages.peer import Fetch, Heartbeat, Hello, Refused, Welcome
from disagg.transceiver.wire.messages.router import (
    LEAVING,
    READY,
    Lease,
    Register,
    Registered,
)
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.node import draw_id

pytestmark = pytest.mark.processes

BASELINE_S = 1.0
NUM_SILENT = 150  # per door: more than any door keeps waiting
PLANES = ("tcp", "shm", "zmq", "ucx")
MAX_GHOSTS = 24  # registrations at once whose lease nothing renews; they are gone after 3 s
GHOSTS_GONE_S = 4.0
SETTLE_S = 0.5  # a lease, in which the router would act on what was said
ASK_AGAIN_MS, MAX_ASKS = 500, 10
SHORT, LONG = MAX_GHOSTS, 100_000
SCALES = [
    pytest.param(SHORT, id="short"),
    pytest.param(LONG, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
]


async def while_guests_come(watch: Watch, work: Callable[[], None]) -> None:
    """Run `work` in a thread; decode workers that come meanwhile are let in on every plane."""
    done = asyncio.Event()
    coming: asyncio.Task[Guests] = asyncio.create_task(guests(watch.pair, PLANES, done))
    await asyncio.to_thread(work)
    done.set()
    seen = await coming
    watch.figures["guests"] = str(seen)
    watch.late += seen.faults[:5]
    watch.late += [f"no guest was let in on the {plane} plane" for plane in PLANES if not seen.num_met.get(plane)]


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(4, id="short"), pytest.param(60, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(240)])],
)
def test_strangers_at_every_door(pair: Pair, asks: list[Ask], seconds: float) -> None:
    doors, rng = pair.doors(), random.Random(1)
    assert {door.owner for door in doors} >= {"router", "prefill-0"}
    with watching(pair, asks, BASELINE_S) as watch:

        def work() -> None:
            knocks = knock(doors, rng, num_rounds=100_000, num_held=NUM_SILENT, seconds=seconds)
            watch.figures["knocks"] = f"{knocks} at {len(doors)} doors"

        aside(lambda: asyncio.run(while_guests_come(watch, work)))


def test_peers_of_another_cluster_get_no_word_in(pair: Pair, asks: list[Ask]) -> None:
    endpoint = worker(pair, "prefill-0")["endpoint"]
    with watching(pair, asks, BASELINE_S):
        for door, word in ((pair.control, registration(pair, "foreign")), (endpoint, hello(pair, draw_id()))):
            with speaking_to(door, knows_secret=False) as foreign:
                foreign.send(encode(word))
                foreign.setsockopt(zmq.RCVTIMEO, 1000)
                with pytest.raises(zmq.Again):
                    foreign.recv_multipart()
        assert {known["id"] for known in pair.api.workers()} == {"prefill-0", "decode-0"}


@pytest.mark.parametrize("count", SCALES)
def test_any_message_to_the_router(pair: Pair, asks: list[Ask], count: int) -> None:
    with watching(pair, asks, BASELINE_S) as watch:
        with speaking_to(pair.control) as insider:
            insider.send(encode(registration(pair, "insider")))
            registered = next_of(insider, Registered)
            words = some_messages(registered.incarnation, registered.router_incarnation, count)
            watch.figures["messages"] = aside(lambda: say(insider, words))
        watch.figures["registrations"] = aside(lambda: _register_ghosts(pair, count))


def some_messages(incarnation: str, destination: str, count: int) -> list[bytes]:
    """Of all kinds, at all extremes."""
    every = [data for kind, form in forms(incarnation, destination) for data in mutants(kind, form)]
    return every if len(every) <= count else random.Random(2).sample(every, count)


def some_changes(form: dict[str, Any], keep: frozenset[str], count: int) -> list[Change]:
    """Numbers that are zero come first: most rules divide, or count, by something."""
    every = list(changes(form, keep))
    random.Random(3).shuffle(every)
    return sorted(every, key=lambda change: (type(change.value), change.value) != (int, 0))[:count]


def _register_ghosts(pair: Pair, count: int) -> int:
    """Registrations that are right but for one field, each in a name of its own."""
    form = packed_form(registration(pair, "ghost"))
    every = some_changes(form, frozenset({"incarnation", "worker_id", "role"}), count)
    for start in range(0, len(every), MAX_GHOSTS):
        for number, change in enumerate(every[start : start + MAX_GHOSTS], start):
            mine = form | {"incarnation": draw_id(), "worker_id": f"ghost-{number}"}
            with speaking_to(pair.control) as ghost:
                ghost.send(pack(Register, change.applied_to(mine)))
        time.sleep(GHOSTS_GONE_S)
    return len(every)


@pytest.mark.parametrize("count", SCALES)
def test_any_message_to_the_prefill_worker(pair: Pair, asks: list[Ask], count: int) -> None:
    known = worker(pair, "prefill-0")
    with watching(pair, asks, BASELINE_S) as watch:

        def work() -> None:
            with speaking_to(known["endpoint"]) as insider:
                mine = hello(pair, draw_id())
                insider.send(encode(mine))
                next_of(insider, Welcome)
                watch.figures["messages"] = say(insider, some_messages(mine.incarnation, known["incarnation"], count))
            watch.figures["greetings"] = _greet(pair, known["endpoint"], count)

        aside(lambda: asyncio.run(while_guests_come(watch, work)))


def _greet(pair: Pair, endpoint: str, count: int) -> int:
    """HELLOs that are right but for one field, each of another incarnation."""
    form = packed_form(hello(pair, draw_id()))
    every = some_changes(form, frozenset({"incarnation"}), count)
    with speaking_to(endpoint) as insider:
        return say(insider, [pack(Hello, change.applied_to(form | {"incarnation": draw_id()})) for change in every])


@pytest.mark.parametrize("count", SCALES)
def test_any_message_to_the_decode_worker(pair: Pair, asks: list[Ask], count: int) -> None:
    """From a prefill worker that is registered, and so is connected to."""
    with watching(pair, asks, BASELINE_S) as watch, rogue(pair, "rogue") as peer:
        theirs = peer.wait_for_hello()
        geometry = packed_form(Welcome(peer.incarnation, "rogue", theirs.identity, theirs.geometry, ()))
        welcomes = [pack(Welcome, change.applied_to(geometry)) for change in changes(geometry)]
        words = welcomes + some_messages(peer.incarnation, theirs.incarnation, 100_000)
        if len(words) > count:
            words = random.Random(5).sample(words, count)
        aside(lambda: peer.say_all(words))
        watch.figures["messages"] = len(words)


@pytest.mark.parametrize("to", ["router", "prefill-0"])
def test_messages_as_long_as_a_message_may_be(pair: Pair, asks: list[Ask], to: str) -> None:
    endpoint = pair.control if to == "router" else worker(pair, to)["endpoint"]
    kinds = (Lease, Tokens) if to == "router" else (Heartbeat, Fetch)
    words = [data for kind, form in forms(draw_id(), draw_id()) if kind in kinds for data in largest(kind, form)]
    with watching(pair, asks, BASELINE_S) as watch, speaking_to(endpoint) as insider:
        watch.figures["messages"] = aside(lambda: say(insider, words))
        time.sleep(SETTLE_S)


def test_words_in_the_name_of_another_worker(pair: Pair, asks: list[Ask]) -> None:
    """That it leaves, that it holds nothing: they count on the worker's own connection only."""
    with watching(pair, asks, BASELINE_S), speaking_to(pair.control) as insider:
        insider.send(encode(registration(pair, "insider")))
        router = next_of(insider, Registered).router_incarnation
        for worker_id in ("prefill-0", "decode-0"):
            for state in (READY, LEAVING):
                insider.send(encode(Lease(worker(pair, worker_id)["incarnation"], router, state=state)))
                time.sleep(SETTLE_S)


def ask_until_answered(insider: zmq.Socket[bytes], register: bytes) -> Refused:
    """REGISTER is repeated until it is answered: a name that is taken is asked for again."""
    insider.setsockopt(zmq.RCVTIMEO, ASK_AGAIN_MS)
    for _ in range(MAX_ASKS):
        insider.send(register)
        with contextlib.suppress(zmq.Again):
            refused: Refused = next_of(insider, Refused)
            return refused
    raise AssertionError(f"a twin asked {MAX_ASKS} times for a name that is taken, and was not refused")


def test_registrations_said_again_by_another_process(pair: Pair, asks: list[Ask]) -> None:
    """Twins of live workers: the same name, and the same registration word for word."""
    with watching(pair, asks, BASELINE_S):
        for worker_id in ("prefill-0", "decode-0"):
            replayed = registration_of(pair, worker_id)
            twin = replace(replayed, incarnation=draw_id())
            with speaking_to(pair.control) as insider:
                refused = ask_until_answered(insider, encode(twin))
                assert refused.field == "worker_id", refused
                for _ in range(3):
                    insider.send(encode(replayed))
                time.sleep(SETTLE_S)
        time.sleep(GHOSTS_GONE_S)
