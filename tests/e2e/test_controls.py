"""Are the checks of tokens and of bytes able to fail? Workers that are wrong in one thing must not pass them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support.cluster.hand_started import Cluster, cluster
from support.faults.switches import WIDE
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family
from support.oracles.token_walk import StoredLayer, minimum_nbytes, stored_layers

pytestmark = pytest.mark.processes

NUM_TOKENS = 8
BLOCK_SIZE = 8
PROMPT_LEN = 61
FLAGS = (
    "--dtype",
    "float32",
    "--block-size",
    str(BLOCK_SIZE),
    "--max-model-len",
    "128",
    "--max-num-seqs",
    "4",
    "--no-enable-prefix-caching",
)


@dataclass(frozen=True)
class Case:
    cluster: Cluster
    layers: list[StoredLayer]
    reference: Reference


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Both workers store and fetch one block more than the window needs."""
    folder = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    model = build_family("gemma3")
    (reference,) = safe_prompts(model, [PROMPT_LEN], NUM_TOKENS)
    faults = tmp_path_factory.mktemp("faults")
    (faults / WIDE).touch()
    with cluster(folder, faults, *FLAGS) as made:
        made.allow_attempts(1)
        made.start_worker("prefill", "prefill-0")
        made.start_worker("decode", "decode-0")
        made.wait_until_linked()
        yield Case(made, stored_layers(model, itemsize=4), reference)


def ask(case: Case, request_id: str) -> Any:
    greedy = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    status, body = case.cluster.system.complete(list(case.reference.prompt), request_id=request_id, **greedy)
    assert status == 200, body
    return tuple(body["choices"][0]["token_ids"])


def test_one_surplus_block_changes_no_token_and_shows_in_the_bytes(case: Case) -> None:
    same(ask(case, "surplus"), case.reference.token_ids)
    moved = case.cluster.system.record("surplus")["transfer"]["nbytes"]
    least = minimum_nbytes(case.layers, PROMPT_LEN, BLOCK_SIZE)
    one_block = sum(layer.token_nbytes for layer in case.layers if layer.window) * BLOCK_SIZE
    assert moved != sum(least.values())
    assert moved == sum(least.values()) + one_block


def test_a_window_that_is_off_by_one_changes_the_tokens(case: Case) -> None:
    case.cluster.faults.set(narrow_window={})
    tokens = ask(case, "narrow")
    assert case.cluster.faults.num_fired("narrow_window") == 1
    assert tokens != case.reference.token_ids
    case.cluster.faults.set()
    same(ask(case, "right"), case.reference.token_ids)


def test_a_decode_worker_that_computes_the_prompt_itself_shows_in_the_counters(case: Case) -> None:
    system = case.cluster.system
    system.settle()
    computed = system.total("disagg_prompt_tokens_computed_total", worker="decode-0")
    case.cluster.faults.set(recompute={})
    same(ask(case, "recomputed"), case.reference.token_ids)
    assert case.cluster.faults.num_fired("recompute") == 1
    case.cluster.faults.set()
    system.settle()
    assert system.total("disagg_prompt_tokens_computed_total", worker="decode-0") == computed + PROMPT_LEN
    assert computed == 0
    assert not (system.record("recomputed")["transfer"] or {}).get("nbytes")
    system.wait_until_idle()  # the prefill worker, whom nobody asked, is told by the router to let go
