"""Pools with a host side of their own, as on accelerators: what peers see is a copy, and so is what lands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support.cluster.hand_started import Cluster, cluster
from support.faults.switches import STAGED, Faults
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family
from support.oracles.token_walk import minimum_nbytes, stored_layers

pytestmark = pytest.mark.processes

NUM_TOKENS, BLOCK_SIZE = 8, 8
LENGTHS = (9, 31, 61, 90)
FLAGS = ("--dtype", "float32", "--block-size", str(BLOCK_SIZE), "--max-model-len", "128", "--max-num-seqs", "4")


@dataclass(frozen=True)
class Case:
    cluster: Cluster
    faults: Faults
    nbytes: dict[int, int]
    references: list[Reference]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    model = build_family("gemma3")
    references = safe_prompts(model, LENGTHS, NUM_TOKENS)
    layers = stored_layers(model, itemsize=4)
    nbytes = {length: sum(minimum_nbytes(layers, length, BLOCK_SIZE).values()) for length in LENGTHS}
    faults = tmp_path_factory.mktemp("faults")
    (faults / STAGED).touch()
    with cluster(folder, faults, *FLAGS) as made:
        made.allow_attempts(1)
        made.start_worker("prefill", "prefill-0", "--max-num-batched-tokens", "37")
        made.start_worker("decode", "decode-0")
        made.wait_until_linked()
        yield Case(made, Faults(faults), nbytes, references)


def ask(case: Case, reference: Reference, request_id: str, salt: str) -> tuple[int, ...]:
    greedy: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "cache_salt": salt}
    status, body = case.cluster.system.complete(list(reference.prompt), request_id=request_id, **greedy)
    assert status == 200, body
    return tuple(body["choices"][0]["token_ids"])


def test_tokens_are_right_and_only_what_is_needed_moves(case: Case) -> None:
    for reference in case.references:
        length = len(reference.prompt)
        same(ask(case, reference, f"p{length}", "first"), reference.token_ids)
        assert case.cluster.system.record(f"p{length}")["transfer"]["nbytes"] == case.nbytes[length]


def test_blocks_that_are_held_on_both_sides_are_reused(case: Case) -> None:
    reference = case.references[-1]
    same(ask(case, reference, "turn1", "turns"), reference.token_ids)
    same(ask(case, reference, "turn2", "turns"), reference.token_ids)
    assert case.cluster.system.record("turn2")["transfer"]["nbytes"] < case.nbytes[len(reference.prompt)] / 2


@pytest.mark.parametrize("name", ["forget_publish", "forget_take_in"])
def test_a_forgotten_copy_shows(case: Case, name: str) -> None:
    """Negative control: without either copy the decode worker computes on zeros."""
    case.faults.set(**{name: {"times": 100}})
    assert ask(case, case.references[-1], name, name) != case.references[-1].token_ids
    assert case.faults.num_fired(name)
    case.faults.set()
