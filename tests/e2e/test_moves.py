"""Every live answer of a decode worker moves to another while clients read: no token is lost, repeated or changed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from support.cluster.calls import Call, until
from support.cluster.three_processes import Part, Trio, running_trio
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

from disagg.cache.admission import peak_slots
from disagg.cache.layout import LayerSpec, derive_layout

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

    def moves(self) -> tuple[int, list[float]]:
        """How many moves the calls' records tell of, and their pauses in seconds, ascending."""
        records = [self.trio.api.record(call.request_id) for call in self.calls]
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
def running_fleet(folder: Any, dtype: str, flags: tuple[str, ...] = ()) -> Iterator[Fleet]:
    model = save_family("gemma3", folder)
    with running_trio(model) as trio:
        fleet = Fleet(trio, [])
        told = ("--dtype", dtype, *FLAGS)
        for name, role in WORKERS.items():
            fleet.parts[name] = trio.start(role, name, *told, *(flags if role == "decode" else ()))
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
        fleet.assert_whole()
        assert fleet.moves()[0] > num_moves
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


@pytest.mark.slow
def test_answers_move_before_they_would_be_preempted_where_there_is_room(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """All answers begin at one worker, whose pools seat three of them, and the other comes back when they grow."""
    flags = ("--kv-cache-memory", str(pools_nbytes(3)))
    with running_fleet(tmp_path_factory.mktemp("gemma3"), "float32", flags) as fleet:
        asyncio.run(grown_out_of_one_worker(fleet))
        fleet.assert_whole()
        num_moves, _ = fleet.moves()
        preempted = fleet.trio.api.total("disagg_preemptions_total")
        assert num_moves > 0
        print(f"{len(fleet.calls)} answers over the pools of three: {num_moves} moves, {preempted:.0f} preemptions")


async def grown_out_of_one_worker(fleet: Fleet) -> None:
    await asyncio.to_thread(fleet.trio.api.drain, "decode-1")
    load = asyncio.create_task(fleet.run())
    await fleet.answers_at("decode-0", least=4)
    fleet.is_over = True
    await asyncio.to_thread(fleet.trio.api.drain, "decode-1", undo=True)
    await load


def pools_nbytes(num_seqs: int) -> int:
    """Bytes of pools that hold so many sequences of the longest, and no more."""
    config = build_family("gemma3").config
    layers = [
        LayerSpec(i, config.sliding_window if kind == "sliding_attention" else None, 0, 2, 16, "float32", i)
        for i, kind in enumerate(config.layer_types)
    ]
    layout = derive_layout(layers, block_size=8, max_model_len=256)
    peaks = peak_slots(layout, total_tokens=256, history=0, step_tokens=64)
    return sum((num_seqs * peak + 2) * size for peak, size in zip(peaks, layout.slot_nbytes, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hundred_times_every_answer_of_a_worker_moves(tmp_path_factory: pytest.TempPathFactory, dtype: str) -> None:
    with running_fleet(tmp_path_factory.mktemp("gemma3"), dtype) as fleet:
        took = asyncio.run(emptied_in_turn(fleet, 100))
        num_equal = fleet.assert_whole(exactly=dtype == "float32")
        print(f"{dtype}: {told(fleet, took)}; {num_equal} of {len(fleet.calls)} as an unmoved float32 run")


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["source", "sink"])
@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1])
def test_a_worker_killed_while_answers_move_costs_no_token(
    tmp_path_factory: pytest.TempPathFactory, dies: str, after_s: float
) -> None:
    with running_fleet(tmp_path_factory.mktemp("gemma3"), "float32") as fleet:
        asyncio.run(killed_while_moving(fleet, "decode-0" if dies == "source" else "decode-1", after_s))
        fleet.assert_whole()
        print(f"{dies} killed: {told(fleet, [0.0])}")


async def killed_while_moving(fleet: Fleet, name: str, after_s: float) -> None:
    load = asyncio.create_task(fleet.run())
    await fleet.answers_at("decode-0")
    await asyncio.to_thread(fleet.trio.api.drain, "decode-0")
    await asyncio.sleep(after_s)
    await asyncio.to_thread(fleet.parts[name].kill)
    await asyncio.to_thread(fleet.trio.api.drain, "decode-0", undo=True)
    await asyncio.sleep(1.0)
    fleet.is_over = True
    await load
