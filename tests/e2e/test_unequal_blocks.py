"""Workers of different block sizes, as real processes: the same tokens, the same logprobs, no byte more than needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
from support.cluster.mixed_cluster import START_TIMEOUT_S, mixed_cluster
from support.cluster.system import System
from support.faults.wrong import same
from support.model.families import MIN_GAP, Reference, build_family, reference_generate, safe_prompts, save_family
from support.oracles.token_walk import StoredLayer, minimum_nbytes, stored_layers

pytestmark = [pytest.mark.processes, pytest.mark.timeout(START_TIMEOUT_S + 60)]

NUM_TOKENS = 8
LENGTHS = (7, 8, 17, 33, 47, 70)  # inside blocks of 8 and 16, at their ends, past the window of 24
WORKERS = {
    "prefill-16": ("prefill", 16, "shm,tcp,zmq"),
    "prefill-8": ("prefill", 8, "shm,tcp,zmq"),
    "decode-8": ("decode", 8, "shm"),
    "decode-16": ("decode", 16, "tcp"),
}


@dataclass(frozen=True)
class Case:
    system: System
    layers: list[StoredLayer]
    references: list[Reference]
    prefixes: list[Reference]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("unequal")
    model = build_family("gemma3")
    references = safe_prompts(model, LENGTHS, NUM_TOKENS)
    parts = [reference_generate(model, references[-1].prompt[:length], NUM_TOKENS) for length in range(62, 33, -1)]
    prefixes = [part for part in parts if part.min_gap >= MIN_GAP]
    flags = {
        name: (role, "--block-size", str(block_size), "--planes", planes)
        for name, (role, block_size, planes) in WORKERS.items()
    }
    with mixed_cluster(save_family("gemma3", folder / "model"), folder, flags) as system:
        yield Case(system, stored_layers(model, itemsize=4), references, prefixes)


def ask(system: System, reference: Reference, request_id: str, cache_salt: str) -> Any:
    """Requests of one salt reuse each other's blocks."""
    status, body = system.complete(
        list(reference.prompt),
        request_id=request_id,
        cache_salt=cache_salt,
        max_tokens=NUM_TOKENS,
        temperature=0,
        ignore_eos=True,
        logprobs=5,
        return_tokens_as_token_ids=True,
    )
    assert status == 200, body
    return body["choices"][0]


def test_every_pair_of_block_sizes_answers_alike_and_moves_the_finer_minimum(case: Case) -> None:
    """Equal pairs are the control: the unequal ones must give the same tokens and logprobs, step by step."""
    pairs = set(product(("prefill-16", "prefill-8"), ("decode-8", "decode-16")))
    for reference in case.references:
        prompt_len, answers = len(reference.prompt), {}
        for turn in range(4):  # an idle cluster's pairs take turns
            request_id = f"p{prompt_len}-{turn}"
            choice = ask(case.system, reference, request_id, cache_salt=request_id)
            record = case.system.record(request_id)
            (attempt,) = record["attempts"]
            pair = attempt["prefill"], attempt["decode"]
            answers[pair] = choice
            unit = min(WORKERS[name][1] for name in pair)
            expected = minimum_nbytes(case.layers, prompt_len, unit)
            assert record["transfer"]["nbytes"] == sum(expected.values()), f"{pair}: prompt of {prompt_len}"
            assert record["transfer"]["plane"] == WORKERS[pair[1]][2]
            same(tuple(choice["token_ids"]), reference.token_ids, f"{pair}: prompt of {prompt_len}")
        assert set(answers) == pairs
        equal = answers["prefill-8", "decode-8"]["logprobs"]["token_logprobs"]
        for pair, choice in answers.items():
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(equal, abs=1e-4), f"{pair}"
    case.system.settle()
    case.system.wait_until_idle()


def test_reuse_never_finds_a_block_of_which_only_a_part_was_received(case: Case) -> None:
    """The longest prompt's window begins inside a block of 16 that came from a sender of 8s as its second half only.

    Its prefixes reach further back, into the half that never came; all that was registered must still be right.
    """
    system, longest, salt, pair = case.system, case.references[-1], "", ()
    while pair != ("prefill-8", "decode-16"):
        salt += "s"  # nothing is shared with what another pair served
        ask(system, longest, salt, cache_salt=salt)
        (attempt,) = system.record(salt)["attempts"]
        pair = attempt["prefill"], attempt["decode"]
    assert len(case.prefixes) > 8
    num_moved = []
    for number, reference in enumerate(case.prefixes):
        choice = ask(system, reference, f"prefix-{number}", cache_salt=salt)
        name = f"prefix of {len(reference.prompt)}: {system.record(f'prefix-{number}')['attempts']}"
        same(tuple(choice["token_ids"]), reference.token_ids, name)
        for value, top in zip(choice["logprobs"]["token_logprobs"], reference.top_logprobs, strict=True):
            assert value == pytest.approx(top[0][1], abs=2e-3), name
        num_moved.append(system.record(f"prefix-{number}")["transfer"]["nbytes"])
    least = [sum(minimum_nbytes(case.layers, len(reference.prompt), 8).values()) for reference in case.prefixes]
    assert sum(num_moved) < sum(least) / 2, "next to nothing was reused"
    system.settle()
    system.wait_until_idle()
