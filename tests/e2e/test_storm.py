"""200 requests, 64 at a time, a third of whose clients leave in the middle: nothing is kept, and the rest are right."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.cluster.storm import Outcome, Shot, phases_left_in, storm
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]  # up to three storms, on cores that may be shared

NUM_REQUESTS = 200
NUM_IN_FLIGHT = 64
LENGTHS = (6, 17, 40, 90, 150, 260)
NUM_TOKENS = 8
NUM_TOKENS_OF_LEAVERS = 56  # more than they stay for, mostly
PLANES = ("shm", pytest.param("zmq", marks=pytest.mark.slow))
PATIENCES_S = (2.5, 1.0, 0.4)  # storms on ever faster machines, until clients have left in every phase
FLAGS = (
    *("--dtype", "float32", "--block-size", "8", "--max-model-len", "320"),
    *("--max-num-seqs", "16", "--max-num-batched-tokens", "32"),  # seats are few and long prompts take many steps
    "--no-enable-prefix-caching",  # prompts come again: each must take those steps, so that clients leave during them
)


@dataclass(frozen=True)
class Case:
    system: System
    references: list[Reference]


@pytest.fixture(scope="module", params=PLANES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    references = safe_prompts(build_family("gemma3"), LENGTHS, NUM_TOKENS)
    with running("--model", str(folder), *FLAGS, "--planes", request.param) as system:
        yield Case(system, references)


def make_shots(references: list[Reference], patience_s: float) -> list[Shot]:
    """Every third client leaves: after some tokens, or at a random moment. Their prompts and answers are long."""
    rng = random.Random(7)
    shots = []
    for number in range(NUM_REQUESTS):
        if number % 3:
            shots.append(Shot(f"{patience_s}-{number}", rng.choice(references).prompt, NUM_TOKENS))
            continue
        after_tokens = rng.random() < 0.25
        leave: dict[str, Any] = (
            {"leave_after_tokens": rng.randint(1, 9)} if after_tokens else {"leave_after_s": patience_s * rng.random()}
        )
        prompt = rng.choice(references[-3:]).prompt
        shots.append(Shot(f"{patience_s}-{number}", prompt, NUM_TOKENS_OF_LEAVERS, **leave))
    return shots


@dataclass
class Gauge:
    """Used blocks as the two endpoints give them. They agree when no lease came between the readings."""

    system: System = field(repr=False)
    peak: float = 0
    num_compared: int = 0

    def look(self) -> None:
        before = self._from_metrics()
        shown = {
            (worker["id"], str(pool["pool"])): pool["used"]
            for worker in self.system.workers()
            for pool in worker["blocks"]
        }
        after = self._from_metrics()
        self.peak = max(self.peak, *after.values())
        if before == after and any(after.values()):
            assert shown == after
            self.num_compared += 1

    def _from_metrics(self) -> dict[tuple[str, str], float]:
        samples = self.system.samples("disagg_kv_blocks_used")
        return {(dict(labels)["worker"], dict(labels)["pool"]): used for labels, used in samples.items()}


def check_outcomes(outcomes: list[Outcome], references: list[Reference]) -> None:
    """Whoever stayed has a whole and right answer; whoever left saw nothing wrong until then."""
    answers = {reference.prompt: list(reference.token_ids) for reference in references}
    for outcome in outcomes:
        assert outcome.error is None, outcome
        assert outcome.left or (outcome.status, outcome.done) == (200, True), outcome
        assert outcome.left or len(outcome.token_ids) == outcome.shot.max_tokens, outcome
        known = min(len(outcome.token_ids), NUM_TOKENS)
        same(outcome.token_ids[:known], answers[outcome.shot.prompt][:known], outcome)


def test_a_storm_with_clients_leaving_in_every_phase_leaves_nothing_behind(case: Case) -> None:
    system, gauge = case.system, Gauge(case.system)
    phases: dict[str, float] = {}
    for patience_s in PATIENCES_S:
        shots = make_shots(case.references, patience_s)
        outcomes = asyncio.run(storm(system.url, shots, num_in_flight=NUM_IN_FLIGHT, watch=gauge.look))
        system.settle()
        system.wait_until_idle()
        check_outcomes(outcomes, case.references)
        num_left, phases = sum(outcome.left for outcome in outcomes), phases_left_in(system)
        print(f"{num_left} of {NUM_REQUESTS} clients left; by phase: {phases}; {gauge}")
        if all(phases.values()) and num_left > NUM_REQUESTS / 4:
            break
    else:
        raise AssertionError(f"the storms left a phase out: {phases}")
    assert gauge.peak > 0
    assert gauge.num_compared > 0
    assert system.total("disagg_kv_blocks_used") == 0
    assert {worker["running"] + worker["queued"] + worker["requests"] for worker in system.workers()} == {0}
    assert system.total("disagg_prompt_tokens_computed_total", worker="decode-0") == 0


def test_requests_after_the_storm_are_served(case: Case) -> None:
    for reference in case.references:
        status, body = case.system.complete(
            list(reference.prompt), max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True
        )
        assert status == 200, body
        same(tuple(body["choices"][0]["token_ids"]), reference.token_ids)
