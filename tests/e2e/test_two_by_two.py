"""Two prefill and two decode workers: every pair moves what it must, and who served makes no difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family
from support.oracles.token_walk import StoredLayer, minimum_nbytes, stored_layers

pytestmark = pytest.mark.processes

BLOCK_SIZE = 8
NUM_TOKENS = 12
LENGTHS = (5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 26, 31, 32, 33, 40, 47, 48, 49, 56, 63, 65, 71, 73, 80, 88, 90, 96, 97)
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
FLAGS = (
    *("--prefill", "2", "--decode", "2", "--dtype", "float32", "--block-size", str(BLOCK_SIZE)),
    *("--max-model-len", "128", "--max-num-batched-tokens", "37"),
    *("--max-num-seqs", "16"),  # room for every prompt until it is fetched: none is computed twice
)


@dataclass(frozen=True)
class Case:
    system: System
    layers: list[StoredLayer]
    references: list[Reference]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    with ThreadPoolExecutor(1) as thread, running("--model", str(folder), *FLAGS) as system:
        model = build_family("gemma3")
        references = thread.submit(safe_prompts, model, LENGTHS, NUM_TOKENS).result()
        yield Case(system, stored_layers(model, itemsize=4), references)


def ask(system: System, reference: Reference) -> Any:
    status, answer = system.complete(
        list(reference.prompt),
        request_id=f"p{len(reference.prompt)}",
        max_tokens=NUM_TOKENS,
        temperature=0,
        ignore_eos=True,
    )
    assert status == 200, answer
    return answer["choices"][0]["token_ids"]


def of_worker(system: System, name: str, **labels: str) -> dict[str, float]:
    return {worker: system.total(name, worker=worker, **labels) for worker in WORKERS}


def test_requests_at_once_over_every_pair_give_the_references_and_move_the_minimum(case: Case) -> None:
    system = case.system
    with ThreadPoolExecutor(len(LENGTHS)) as clients:
        answers = list(clients.map(lambda reference: ask(system, reference), case.references))
    same([tuple(answer) for answer in answers], [reference.token_ids for reference in case.references])
    pairs: Counter[tuple[str, str]] = Counter()
    landed: Counter[str] = Counter()
    computed: Counter[str] = Counter()
    for prompt_len in LENGTHS:
        record = system.record(f"p{prompt_len}")
        (attempt,) = record["attempts"]
        pairs[attempt["prefill"], attempt["decode"]] += 1
        expected_nbytes = sum(minimum_nbytes(case.layers, prompt_len, BLOCK_SIZE).values())
        assert record["transfer"]["nbytes"] == expected_nbytes, f"prompt of {prompt_len}"
        landed[attempt["decode"]] += expected_nbytes
        computed[attempt["prefill"]] += prompt_len
    assert len(pairs) == 4, pairs  # least loaded, in turn: no worker is left out of 28 requests at once
    system.settle()
    system.wait_until_idle()
    assert of_worker(system, "disagg_transfer_bytes_total") == {worker: landed[worker] for worker in WORKERS}
    assert system.total("disagg_transfer_bytes_total", outcome="verified") == landed.total()
    assert of_worker(system, "disagg_prompt_tokens_computed_total") == {worker: computed[worker] for worker in WORKERS}
    generated = of_worker(system, "disagg_tokens_generated_total")
    assert all(generated.values()), generated
    # each first token is sampled by the prefill worker, all others by the decode worker
    assert generated["prefill-0"] + generated["prefill-1"] == len(LENGTHS)
    assert generated["decode-0"] + generated["decode-1"] == len(LENGTHS) * (NUM_TOKENS - 1)
    assert len({worker["pid"] for worker in system.workers()} | {system.pid_of("router")}) == 5
