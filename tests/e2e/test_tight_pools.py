"""Pools that hold one of the longest requests and a half; two prefill, two decode workers; bursts of long and short."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cluster.storm import Shot, storm
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

from disagg.cache.admission import peak_slots
from disagg.cache.layout import derive_layout
from disagg.cache.pool import NUM_RESERVED_SLOTS
from disagg.engine.model.load import load_model

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]  # five processes start, on cores that may be shared

NUM_REQUESTS = 200
NUM_IN_FLIGHT = 64
BLOCK_SIZE = 8
MAX_MODEL_LEN = 128
STEP_TOKENS = 37
NUM_TOKENS = 6
LENGTHS = (5, 9, 31, 64, 100, MAX_MODEL_LEN - NUM_TOKENS)
NUM_WORKERS = 4
PLANES = ("shm", pytest.param("zmq", marks=pytest.mark.slow))
FLAGS = (
    *("--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-seqs", "4", "--max-num-batched-tokens", str(STEP_TOKENS), "--prefill", "2", "--decode", "2"),
)


@dataclass(frozen=True)
class Need:
    """What one request of the longest kind holds at its peak: slots per pool, and bytes per slot."""

    peaks: tuple[int, ...]
    slot_nbytes: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path) -> Need:
        layers = load_model(folder, dtype="float32", device="cpu").layers
        layout = derive_layout(layers, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN)
        peaks = peak_slots(layout, total_tokens=MAX_MODEL_LEN, history=0, step_tokens=STEP_TOKENS)
        return cls(peaks, layout.slot_nbytes)

    @property
    def nbytes_for_one_and_a_half(self) -> int:
        pairs = zip(self.peaks, self.slot_nbytes, strict=True)
        return sum((peak * 3 // 2 + NUM_RESERVED_SLOTS) * nbytes for peak, nbytes in pairs)


@dataclass(frozen=True)
class Case:
    system: System
    need: Need
    references: list[Reference]


@pytest.fixture(scope="module", params=PLANES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    references = safe_prompts(build_family("gemma3"), LENGTHS, NUM_TOKENS)
    need = Need.of(folder)
    memory = str(NUM_WORKERS * need.nbytes_for_one_and_a_half)
    flags = ("--kv-cache-memory", memory, "--planes", request.param)
    with running("--model", str(folder), *FLAGS, *flags) as system:
        yield Case(system, need, references)


def adversarial_shots(references: list[Reference], name: str) -> list[Shot]:
    """Bursts: the longest ones first, everywhere at once; then short ones between long ones; then anything.

    Some want one token only: a prefill worker serves those alone, between prompts that wait for a decode worker.
    """
    rng = random.Random(11)
    short, long = references[:3], references[3:]
    order = [references[-1]] * 24
    order += [rng.choice(pair) for _ in range(40) for pair in (short, long)]
    order += [rng.choice(long) for _ in range(24)] + [rng.choice(short) for _ in range(24)]
    order += [rng.choice(references) for _ in range(NUM_REQUESTS - len(order))]
    return [
        Shot(f"{name}-{number}", reference.prompt, 1 if number % 9 == 5 else NUM_TOKENS)
        for number, reference in enumerate(order)
    ]


def test_pools_hold_one_request_of_the_longest_kind_but_not_two(case: Case) -> None:
    workers = case.system.workers()
    assert len(workers) == NUM_WORKERS
    for worker in workers:
        for pool, peak in zip(worker["blocks"], case.need.peaks, strict=True):
            assert peak <= pool["slots"] - NUM_RESERVED_SLOTS < 2 * peak, worker["blocks"]


def test_every_request_of_an_adversarial_order_finishes_with_the_right_tokens(case: Case) -> None:
    shots = adversarial_shots(case.references, "order")
    assert len(shots) == NUM_REQUESTS
    outcomes = asyncio.run(storm(case.system.url, shots, num_in_flight=NUM_IN_FLIGHT))
    answers = {reference.prompt: list(reference.token_ids) for reference in case.references}
    for outcome in outcomes:
        assert (outcome.status, outcome.done) == (200, True), outcome
        same(outcome.token_ids, answers[outcome.shot.prompt][: outcome.shot.max_tokens], outcome)
    system = case.system
    system.settle()
    system.wait_until_idle()
    for role in ("prefill", "decode"):
        computed = [
            system.total("disagg_tokens_generated_total", worker=worker["id"]) for worker in system.workers(role)
        ]
        assert all(computed), computed  # every worker took part
    assert system.total("disagg_requests_total", outcome="finished") == NUM_REQUESTS
    assert system.total("disagg_transfers_total", purpose="handoff", outcome="verified") == sum(
        shot.max_tokens > 1 for shot in shots
    )


def test_workers_killed_in_the_middle_of_a_burst_cost_only_answers_that_had_begun(case: Case) -> None:
    """One of each role dies. What had no token yet is answered by the others, whose pools are as tight as before."""
    system = case.system
    doomed = {name: system.pid_of(name) for name in ("prefill-0", "decode-0")}
    killed: list[str] = []

    def kill_in_the_middle() -> None:
        # As of its last lease, half a second old: a worker that shows work seldom shows it twice in so short a storm.
        running = {worker["id"] for worker in system.workers() if worker["running"] or worker["requests"] > 1}
        for name in (running & doomed.keys()) - set(killed):
            os.kill(doomed[name], signal.SIGKILL)
            killed.append(name)

    shots = adversarial_shots(case.references, "killed")[::2]
    outcomes = asyncio.run(storm(system.url, shots, num_in_flight=NUM_IN_FLIGHT, watch=kill_in_the_middle))
    assert set(killed) == set(doomed)
    answers = {reference.prompt: list(reference.token_ids) for reference in case.references}
    num_attempts = []
    for outcome in outcomes:
        assert outcome.status == 200, outcome
        wanted = answers[outcome.shot.prompt][: outcome.shot.max_tokens]
        if outcome.done:
            same(outcome.token_ids, wanted, outcome)
        else:
            assert outcome.error, outcome
            same(outcome.token_ids, wanted[: len(outcome.token_ids)], outcome)
            assert outcome.token_ids, outcome  # it had begun, else it would have been tried anew
        num_attempts.append(len(system.record(outcome.shot.request_id)["attempts"]))
    print(f"attempts per request: {Counter(num_attempts)}; cut: {sum(not outcome.done for outcome in outcomes)}")
    assert max(num_attempts) > 1
    system.wait_until_ready()
    system.settle()
    system.wait_until_idle()
