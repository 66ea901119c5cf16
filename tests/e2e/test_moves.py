"""Every live answer of a decode worker moves to another while clients read: no token is lost, repeated or changed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import aiohttp
import pytest
from support.cluster.calls import Call, until
from support.cluster.three_processes import Part, Trio, running_trio
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

pytestmark = [pytest.mark.processes, pytest.mark.timeout(280)]

LENGTHS = (9, 40, 73, 130)
NUM_TOKENS = 100
NUM_CLIENTS = 6
WORKERS = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
FLAGS = (
    *("--block-size", "8", "--max-model-len", "256"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "64"),
)


@dataclass
class Fleet:
    """A prefill and two decode workers, and clients that ask one after the other."""

    trio: Trio
    references: list[Reference]
    parts: dict[str, Part] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    is_over: bool = False

    def is_linked(self) -> bool:
        """Each decode worker to the prefill worker and to the other."""
        known = {worker["id"]: worker for worker in self.trio.api.workers()}
        links = {name: [link["state"] for link in known[name]["links"]] for name in known if name.startswith("decode")}
        return set(known) == set(WORKERS) and all(states == ["ready"] * 2 for states in links.values())

    async def run(self, num_tokens: int = NUM_TOKENS) -> None:
        """Clients until `is_over`, each answer to its end."""
        numbers = itertools.count(len(self.calls))
        self.is_over = False
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            await asyncio.gather(*(self._ask(session, numbers, num_tokens) for _ in range(NUM_CLIENTS)))

    async def _ask(self, session: aiohttp.ClientSession, numbers: Iterator[int], num_tokens: int) -> None:
        while not self.is_over:
            number = next(numbers)
            call = Call(f"m{number}", True, self.reference(number).prompt, num_tokens)
            self.calls.append(call)
            await call.run(session, self.trio.api.url)

    def reference(self, number: int) -> Reference:
        return self.references[number % len(self.references)]

    async def empty(self, name: str) -> float:
        """Drain a worker of all that it answers; seconds that it took."""
        began_at = time.monotonic()
        await asyncio.to_thread(self.trio.api.drain, name)
        await until(lambda: self.trio.api.worker(name)["requests"] == 0, f"{name} is empty")
        took_s = time.monotonic() - began_at
        await asyncio.to_thread(self.trio.api.drain, name, undo=True)
        return took_s

    async def answers_at(self, name: str, least: int = 2) -> None:
        await until(lambda: self.trio.api.worker(name)["running"] >= least, f"{name} answers", 60)

    def unmoved(self, reference: Reference) -> Reference:
        """As the fleet answers when it has nothing else to do."""
        options = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        status, body = self.trio.api.complete(list(reference.prompt), **options)
        assert status == 200, body
        return replace(reference, token_ids=tuple(body["choices"][0]["token_ids"]))

    def records(self) -> list[dict[str, Any]]:
        return [self.trio.api.record(call.request_id) for call in self.calls]

    def moves(self) -> tuple[int, list[float]]:
        """How many moves the calls' records tell of, and their pauses in seconds, ascending."""
        records = self.records()
        attempts = [attempt for record in records for attempt in record["attempts"]]
        pauses = sorted(attempt["pause_s"] for attempt in attempts if attempt["pause_s"] is not None)
        return sum(record["moves"] for record in records), pauses

    def assert_whole(self, *, exactly: bool = True) -> int:
        """Every call has all its tokens once. Returns how many have those of the reference."""
        num_equal = 0
        for number, call in enumerate(self.calls):
            assert call.is_whole, call
            assert len(call.token_ids) == call.max_tokens, call
            num_equal += tuple(call.token_ids) == self.reference(number).token_ids
            if exactly:
                same(tuple(call.token_ids), self.reference(number).token_ids, call)
        self.trio.api.settle()
        self.trio.api.wait_until_idle()
        return num_equal


@contextlib.contextmanager
def running_fleet(
    folder: Any, dtype: str, own: Mapping[str, tuple[str, ...]] = MappingProxyType({})
) -> Iterator[Fleet]:
    """`own`: flags of single workers."""
    model = save_family("gemma3", folder)
    with running_trio(model) as trio:
        fleet = Fleet(trio, [])
        told = ("--dtype", dtype, *FLAGS)
        for name, role in WORKERS.items():
            fleet.parts[name] = trio.start(role, name, *told, *own.get(name, ()))
        fleet.references = safe_prompts(build_family("gemma3"), LENGTHS, NUM_TOKENS)
        asyncio.run(until(fleet.is_linked, "the fleet is linked", 120))
        yield fleet


async def emptied_in_turn(fleet: Fleet, num_rounds: int) -> list[float]:
    """Under load one decode worker and then the other is emptied, again and again; seconds that each took."""
    took = []
    load = asyncio.create_task(fleet.run())
    for number in range(num_rounds):
        name = f"decode-{number % 2}"
        await fleet.answers_at(name)
        took.append(await fleet.empty(name))
    fleet.is_over = True
    await load
    return took


def told(fleet: Fleet, took: list[float]) -> str:
    num_moves, pauses = fleet.moves()
    p50, p99 = (pauses[int(share * (len(pauses) - 1))] for share in (0.5, 0.99))
    failed = fleet.trio.api.total("disagg_moves_total", outcome="failed")
    return (
        f"{len(fleet.calls)} answers, {len(took)} workers emptied in {sum(took) / len(took):.2f} s on average "
        f"({max(took):.2f} s at most): {num_moves} moves, {failed:.0f} failed; "
        f"pause p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, longest {pauses[-1] * 1e3:.1f} ms"
    )


def test_answers_of_emptied_workers_and_of_one_that_is_stopped_go_on_with_their_own_tokens(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with running_fleet(tmp_path_factory.mktemp("gemma3"), "float32") as fleet:
        took = asyncio.run(emptied_in_turn(fleet, 4))
        num_moves, _ = fleet.moves()
        assert num_moves >= 4
        print(told(fleet, took))
        stopped_s = asyncio.run(stopped_under_load(fleet))
        fleet.assert_whole()  # whether its answers moved or had just ended is the machine's
        print(f"SIGTERM to exit {stopped_s:.2f} s")


async def stopped_under_load(fleet: Fleet) -> float:
    """Seconds from SIGTERM to the end of a decode worker whose answers would last for longer."""
    load = asyncio.create_task(fleet.run())
    await fleet.answers_at("decode-1")
    began_at = time.monotonic()
    fleet.parts["decode-1"].process.terminate()
    assert await asyncio.to_thread(fleet.parts["decode-1"].wait_for_end, 25.0) == 0, fleet.parts["decode-1"].text
    took_s = time.monotonic() - began_at
    fleet.is_over = True
    await load
    return took_s


HOW = {
    "tcp": ("--planes", "tcp"),
    "zmq": ("--planes", "zmq"),
    "unequal blocks": ("--block-size", "16"),
    "no reuse": ("--no-enable-prefix-caching",),
}
"""Flags of the second decode worker, and of all where they must be the same."""


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_answers_move_over_every_plane_and_between_block_sizes(
    tmp_path_factory: pytest.TempPathFactory, how: str
) -> None:
    own = {"decode-1": HOW[how]} if how == "unequal blocks" else dict.fromkeys(WORKERS, HOW[how])
    with running_fleet(tmp_path_factory.mktemp("gemma3"), "float32", own) as fleet:
        took = asyncio.run(emptied_in_turn(fleet, 6))
        fleet.assert_whole()
        assert fleet.moves()[0] >= 6
        print(f"{how}: {told(fleet, took)}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hundred_times_every_answer_of_a_worker_moves(tmp_path_factory: pytest.TempPathFactory, dtype: str) -> None:
    with running_fleet(tmp_path_factory.mktemp("gemma3"), dtype) as fleet:
        fleet.references = [fleet.unmoved(reference) for reference in fleet.references]
        took = asyncio.run(emptied_in_turn(fleet, 100))
        num_equal = fleet.assert_whole(exactly=dtype == "float32")
        print(f"{dtype}: {told(fleet, took)}; {num_equal} of {len(fleet.calls)} as alone and unmoved")


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["source", "sink"])
@pytest.mark.parametrize("after_s", [0.0, 0.03, 0.1])
def test_a_worker_killed_while_answers_move_costs_no_token(
    tmp_path_factory: pytest.TempPathFactory, dies: str, after_s: float
) -> None:
    with running_fleet(tmp_path_factory.mktemp("gemma3"), "float32") as fleet:
        asyncio.run(killed_while_moving(fleet, "decode-0" if dies == "source" else "decode-1", after_s))
        fleet.assert_whole()
        print(f"{dies} killed after {after_s:g} s: {[record['moves'] for record in fleet.records()]} moves")


async def killed_while_moving(fleet: Fleet, name: str, after_s: float) -> None:
    """Answers that have begun: of others the status may be 503, since the last worker that decodes may drain."""
    load = asyncio.create_task(fleet.run())
    await until(lambda: len(fleet.calls) == NUM_CLIENTS, "every client has asked", 60)
    fleet.is_over = True
    began = lambda: len(fleet.calls) == NUM_CLIENTS and all(len(call.token_ids) > 1 for call in fleet.calls)  # noqa: E731
    await until(began, "every answer has begun", 60)
    await asyncio.to_thread(fleet.trio.api.drain, "decode-0")
    await asyncio.sleep(after_s)
    await asyncio.to_thread(fleet.parts[name].kill)
    await asyncio.to_thread(fleet.trio.api.drain, "decode-0", undo=True)
    await load
