"""1,000 clients that go away, over HTTP and through real processes, in every phase of a request: nothing is kept."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from support.cluster.storm import Outcome, Shot, phases_left_in, storm
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # a thousand requests, on cores that may be shared

NUM_ABORTS = 1000
NUM_PER_STORM, NUM_IN_FLIGHT = 250, 64
MAX_STORMS = 12
LENGTHS = (40, 150, 260)
NUM_TOKENS = 8
NUM_TOKENS_OF_LEAVERS = 56  # more than nearly all of them stay for
PATIENCES_S = (2.0, 0.8, 0.3)
"""In turns: long enough to decode, to transfer and to be prefilled, and too short for more than the queue."""
FLAGS = (
    *("--dtype", "float32", "--block-size", "8", "--max-model-len", "320"),
    *("--max-num-seqs", "16", "--max-num-batched-tokens", "32"),  # seats are few and long prompts take many steps
    "--no-enable-prefix-caching",  # prompts come again: each must take those steps, so that clients leave during them
)
PROCESSES = ("router", "prefill-0", "decode-0")


@dataclass(frozen=True)
class Case:
    system: System
    references: list[Reference]

    def pids(self) -> dict[str, int]:
        return {name: self.system.pid_of(name) for name in PROCESSES}


@pytest.fixture(scope="module", params=["shm", "zmq"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    references = safe_prompts(build_family("gemma3"), LENGTHS, NUM_TOKENS)
    with running("--model", str(folder), *FLAGS, "--planes", request.param) as system:
        yield Case(system, references)


def make_shots(references: list[Reference], number: int) -> list[Shot]:
    """Clients that all leave: at a random moment, or after some tokens."""
    rng, patience_s = random.Random(number), PATIENCES_S[number % len(PATIENCES_S)]
    shots = []
    for place in range(NUM_PER_STORM):
        name, prompt = f"storm-{number}-{place}", rng.choice(references).prompt
        if rng.random() < 0.2:
            shots.append(Shot(name, prompt, NUM_TOKENS_OF_LEAVERS, leave_after_tokens=rng.randint(1, 9)))
        else:
            shots.append(Shot(name, prompt, NUM_TOKENS_OF_LEAVERS, leave_after_s=patience_s * rng.random()))
    return shots


def check_outcomes(outcomes: list[Outcome], references: list[Reference]) -> None:
    """Until they left they saw a right answer, and who had the patience a whole one."""
    answers = {reference.prompt: list(reference.token_ids) for reference in references}
    for outcome in outcomes:
        assert outcome.error is None, outcome
        assert outcome.left or (outcome.status, outcome.done) == (200, True), outcome
        known = min(len(outcome.token_ids), NUM_TOKENS)
        same(outcome.token_ids[:known], answers[outcome.shot.prompt][:known], outcome)


def test_a_thousand_aborted_requests_leave_nothing_behind(case: Case) -> None:
    system, before = case.system, case.pids()
    num_left = num_storms = 0
    while num_left < NUM_ABORTS:
        assert num_storms < MAX_STORMS, f"only {num_left} clients left in {num_storms} storms"
        shots = make_shots(case.references, num_storms)
        outcomes = asyncio.run(storm(system.url, shots, num_in_flight=NUM_IN_FLIGHT))
        check_outcomes(outcomes, case.references)
        num_left += sum(outcome.left for outcome in outcomes)
        num_storms += 1
    system.settle()
    system.wait_until_idle()
    phases = phases_left_in(system)
    print(f"{num_left} clients left in {num_storms} storms; by phase: {phases}")
    assert all(phases.values()), f"the storms left a phase out: {phases}"
    assert {worker["running"] + worker["queued"] + worker["requests"] for worker in system.workers()} == {0}
    assert system.total("disagg_prompt_tokens_computed_total", worker="decode-0") == 0
    same(case.pids(), before, "processes that were started again")


def test_the_next_requests_are_answered_by_the_same_processes(case: Case) -> None:
    before = case.pids()
    for reference in case.references:
        status, body = case.system.complete(
            list(reference.prompt), max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True
        )
        assert status == 200, body
        same(tuple(body["choices"][0]["token_ids"]), reference.token_ids)
    same(case.pids(), before)
    case.system.settle()
    case.system.wait_until_idle()
