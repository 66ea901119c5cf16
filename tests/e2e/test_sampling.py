"""Seeded sampling: one worker that does both, and a pair with a transfer between them, choose the same tokens."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.families import VOCAB_SIZE, build_family, save_family
from support.oracles.sampling_reference import check_answer, to_sampling

pytestmark = pytest.mark.processes

NUM_TOKENS = 16
EOS = 2  # the tokenizer's; the models' configurations name none
FLAGS = (
    *("--dtype", "float32", "--block-size", "8", "--max-model-len", "256", "--threads", "1"),
    *("--max-num-seqs", "16", "--max-num-batched-tokens", "37"),
    "--no-enable-prefix-caching",  # the same prompts come again and again: each must be computed, and counted
)
LENGTHS = (5, 24, 33, 70)  # inside the window of 24, at it, past it; the last in more than one chunk
HALF = list(range(4, VOCAB_SIZE, 2))

PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-p": {"top_p": 0.7},
    "top-k": {"top_k": 12},
    "all-filters": {"temperature": 1.3, "top_p": 0.95, "top_k": 50, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.8, "frequency_penalty": 1.1},
    "greedy-penalties": {"temperature": 0, "frequency_penalty": 2.0, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {"50": 12, "51": 11.5, "52": -100}},
    "min-tokens": {"stop_token_ids": HALF, "min_tokens": 5},
    "stop-ids": {"stop_token_ids": HALF},
    "one-token": {"max_tokens": 1},
    "two-tokens": {"max_tokens": 2},
    "eos-first": {"logit_bias": {str(EOS): 100}},
    "eos-ignored": {"logit_bias": {str(EOS): 100}, "ignore_eos": True},
}
TRANSFER_COUNTERS = ("disagg_transfers_total", "disagg_transfer_bytes_total")
CASES = list(product(PARAMETERS, LENGTHS))


@dataclass(frozen=True)
class Pair:
    """The same model served by one worker and by two, and in this process."""

    alone: System
    apart: System
    model: Any


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model = ("--model", str(save_family(request.param, tmp_path_factory.mktemp(request.param))), *FLAGS)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as starters:
        alone = starters.submit(stack.enter_context, running(*model, "--both", "1", "--prefill", "0", "--decode", "0"))
        apart = starters.submit(stack.enter_context, running(*model))
        yield Pair(alone.result(), apart.result(), build_family(request.param))


def prompt_of(length: int) -> list[int]:
    return random.Random(length).choices(range(3, VOCAB_SIZE), k=length)


def fields(length: int, **parameters: Any) -> dict[str, Any]:
    return {"max_tokens": NUM_TOKENS, "temperature": 1.0, "seed": 1000 + length} | parameters


def ask(system: System, length: int, *, request_id: str = "", **parameters: Any) -> Any:
    status, answer = system.complete(prompt_of(length), request_id=request_id, **fields(length, **parameters))
    assert status == 200, answer
    return answer["choices"][0]


def ask_all(system: System) -> list[Any]:
    """Every case at once: each is computed in the company of others."""
    with ThreadPoolExecutor(len(CASES)) as clients:
        return list(
            clients.map(lambda c: ask(system, c[1], request_id=f"{c[0]}-{c[1]}", **PARAMETERS[c[0]]), CASES),
        )


def prompt_tokens_computed(system: System) -> dict[str, float]:
    """By worker, by its own count. Call `settle` first for the figures of now."""
    samples = system.samples("disagg_prompt_tokens_computed_total")
    return {dict(labels)["worker"]: count for labels, count in samples.items()}


def assert_emitters_computed_no_prompt(system: System, before: dict[str, float]) -> None:
    """No worker that emits tokens has computed a token of a prompt since `before`."""
    system.settle()
    after = prompt_tokens_computed(system)
    emitters = [worker["id"] for worker in system.workers() if worker["role"] != "prefill"]
    computed = {name: after[name] - before[name] for name in emitters}
    assert emitters
    assert not any(computed.values()), f"prompt tokens computed where none should be: {computed}"


def ends_with_its_first_token(name: str, choice: Any) -> bool:
    return name == "one-token" or (choice["finish_reason"] == "stop" and len(choice["token_ids"]) == 1)


def test_both_ways_of_serving_choose_what_the_reference_chooses(pair: Pair) -> None:
    before = prompt_tokens_computed(pair.apart)
    num_tokens = num_compared = 0
    for (name, length), alone, apart in zip(CASES, ask_all(pair.alone), ask_all(pair.apart), strict=True):
        token_ids = alone["token_ids"]
        sampling = to_sampling(fields(length, **PARAMETERS[name]), eos=EOS)
        num_safe = check_answer(pair.model, prompt_of(length), token_ids, sampling)
        same(apart["token_ids"][:num_safe], token_ids[:num_safe], (name, length))
        if num_safe == len(token_ids):
            assert apart == alone, (name, length)
        record = pair.apart.record(f"{name}-{length}")
        assert (record["transfer"] is None) == ends_with_its_first_token(name, apart), (name, length)
        num_tokens += len(token_ids)
        num_compared += num_safe
    assert num_compared > 0.95 * num_tokens > 500
    assert_emitters_computed_no_prompt(pair.apart, before)
    after = prompt_tokens_computed(pair.apart)
    # every prompt, and again what had to make room for others before it was fetched
    assert after["prefill-0"] - before["prefill-0"] >= len(PARAMETERS) * sum(LENGTHS)


def test_parameters_have_their_effect(pair: Pair) -> None:
    eos, ignored = (ask(pair.apart, 24, **PARAMETERS[name]) for name in ("eos-first", "eos-ignored"))
    assert (eos["token_ids"], eos["text"], eos["finish_reason"], eos["stop_reason"]) == ([EOS], "", "stop", None)
    assert (ignored["token_ids"], ignored["finish_reason"]) == ([EOS] * NUM_TOKENS, "length")
    stopped, late = (ask(pair.apart, 33, **PARAMETERS[name]) for name in ("stop-ids", "min-tokens"))
    for choice, first_possible in ((stopped, 0), (late, 5)):
        *others, last = choice["token_ids"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", last)
        assert last in HALF
        assert not set(others) & set(HALF)
        assert len(others) >= first_possible
    assert set(ask(pair.apart, 24, **PARAMETERS["bias"])["token_ids"]) == {50, 51}


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(pair: Pair) -> None:
    seeds = (1, 2, 3)
    first, again = ([ask(pair.apart, 33, seed=seed)["token_ids"] for seed in seeds] for _ in range(2))
    assert first == again
    assert len(set(map(tuple, first))) == len(seeds)
    drawn = [ask(pair.apart, 33, seed=None)["token_ids"] for _ in range(2)]
    assert drawn[0] != drawn[1]


def test_an_answer_that_its_first_token_ends_completes_no_transfer(pair: Pair) -> None:
    (first,) = ask(pair.alone, 33, max_tokens=1)["token_ids"]
    endings = {"length": {"max_tokens": 1}, "eos": PARAMETERS["eos-first"], "id": {"stop_token_ids": [first]}}
    pair.apart.settle()
    before = {name: pair.apart.total(name, outcome="verified") for name in TRANSFER_COUNTERS}
    for name, ending in endings.items():
        alone, apart = (ask(system, 33, request_id=f"first-{name}", **ending) for system in (pair.alone, pair.apart))
        assert apart == alone
        same(apart["token_ids"], [EOS if name == "eos" else first])
        assert apart["finish_reason"] == ("length" if name == "length" else "stop")
        record = pair.apart.record(f"first-{name}")
        assert record["transfer"] is None
        (attempt,) = record["attempts"]
        to_prefill_alone = attempt["mode"], attempt["decode"], attempt["prefill"]
        assert to_prefill_alone == ("serve", "prefill-0", None) or name != "length"
    pair.apart.settle()
    assert {name: pair.apart.total(name, outcome="verified") for name in TRANSFER_COUNTERS} == before
    pair.apart.wait_until_idle()  # what the decode worker had reserved was given back


@pytest.mark.parametrize("pair", ["gemma3"], indirect=True)
def test_a_worker_that_does_both_fails_the_assertion_on_prompts(pair: Pair) -> None:
    pair.alone.settle()
    before = prompt_tokens_computed(pair.alone)
    ask(pair.alone, 33)
    with pytest.raises(AssertionError, match=r"'both-0': 33\.0"):
        assert_emitters_computed_no_prompt(pair.alone, before)


@pytest.mark.parametrize("pair", ["gemma3"], indirect=True)
def test_a_decode_worker_that_computes_the_prompt_itself_fails_the_assertion_but_not_the_answer(pair: Pair) -> None:
    """The prefill worker stands still (SIGSTOP), so after its link is lost the decode worker computes the prompt."""
    pair.apart.settle()
    before = prompt_tokens_computed(pair.apart)
    prefill = pair.apart.pid_of("prefill-0")
    os.kill(prefill, signal.SIGSTOP)
    try:
        local = ask(pair.apart, 33, request_id="local")
    finally:
        os.kill(prefill, signal.SIGCONT)
    assert local == ask(pair.alone, 33)
    assert [attempt["mode"] for attempt in pair.apart.record("local")["attempts"]] == ["transfer", "local"]
    with pytest.raises(AssertionError, match=r"'decode-0': 33\.0"):
        assert_emitters_computed_no_prompt(pair.apart, before)
    pair.apart.wait_until_ready()
    pair.apart.wait_until_idle()
