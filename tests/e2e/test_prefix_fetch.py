"""Chats over two prefill and two decode workers in turn: what one worker has, another need not compute."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from support.cluster.system import System, running
from support.faults.wrong import same

pytestmark = pytest.mark.processes

FIRST, MORE, NUM_TOKENS, CHATS, TURNS = 1400, 60, 12, 3, 3
FLAGS = (
    *("--prefill", "2", "--decode", "2", "--dtype", "float32", "--max-model-len", "2048"),
    *("--policy", "round-robin"),
)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with running(*FLAGS) as system:
        yield system


def ask(system: System, prompt: list[int], name: str, **fields: object) -> list[int]:
    status, body = system.complete(
        prompt, request_id=name, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, **fields
    )
    assert status == 200, body
    tokens: list[int] = body["choices"][0]["token_ids"]
    return tokens


def words(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, 211), k=count)


def test_turns_of_chats_at_workers_in_turn_fetch_what_others_have(system: System) -> None:
    """How many come in time is the machine's; what comes is right, and is not computed."""
    asked = 0
    for chat in range(CHATS):
        prompt = words(chat, FIRST)
        for turn in range(TURNS):
            name = f"chat{chat}-{turn}"
            answer = ask(system, prompt, name)
            same(answer, ask(system, prompt, f"{name}-fresh", cache_salt=name))
            asked += len(prompt)
            prompt = prompt + answer + words(100 * chat + turn, MORE)
    system.settle()
    system.wait_until_idle()
    fetched = system.total("disagg_transfers_total", purpose="prefix", outcome="verified")
    assert fetched > 0
    assert system.total("disagg_transfer_bytes_total", purpose="prefix", outcome="verified") > 0
    assert system.total("disagg_transfers_refused_total") == 0
    computed = system.total("disagg_prompt_tokens_computed_total") - asked  # the fresh ones were computed whole
    assert computed < asked - fetched * FIRST / 2
    assert {tuple(w["receives"]) for w in system.workers()} == {("prefix",), ("handoff", "prefix", "move")}
