"""What lm-eval's loglikelihood tasks send, against transformers' own forward pass: the same sums and greedy words.

The requests are those of its `local-completions` model: a batch of prompts as token ids, context and continuation
together, `echo`, `max_tokens` 1, `logprobs` 1. With more tokens to generate the KV also moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.families import VOCAB_SIZE, build_family, save_family

pytestmark = pytest.mark.processes

TOLERANCE = 2e-3
PAIRS = ((1, 3), (7, 1), (20, 9), (60, 40), (24, 8))
"""Tokens of (context, continuation): over chunks of 37 and windows of 24."""
SHARED = 16
"""Tokens that all prompts begin with: without care they would be reused, and have no logits."""


@pytest.fixture(scope="module")
def model() -> Any:
    return build_family("gemma2")  # windows, and a soft cap between head and logits


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder: Path = save_family("gemma2", tmp_path_factory.mktemp("gemma2"))
    flags = ("--dtype", "float32", "--max-model-len", "256", "--block-size", "8", "--max-num-batched-tokens", "37")
    with running("--model", str(folder), "--max-num-seqs", "8", *flags) as system:
        yield system


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    shared = torch.randint(3, VOCAB_SIZE, (SHARED,), generator=generator).tolist()
    lengths = [context + continuation for context, continuation in PAIRS]
    return [
        (shared + torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())[:length] for length in lengths
    ]


def ask(system: System, given: list[list[int]], **options: Any) -> list[Any]:
    body = {"model": "model", "prompt": given, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234, **options}
    del body["model"]  # lm-eval names the one that is served
    status, reply = system.post("/v1/completions", body)
    assert status == 200, reply
    return sorted(reply["choices"], key=lambda choice: choice["index"])


def parsed(choice: Any, context: int) -> tuple[float, bool]:
    """As lm-eval reads it: the sum behind the context, and whether each of its tokens is the likeliest."""
    logprobs = choice["logprobs"]["token_logprobs"][context:-1]
    tops = choice["logprobs"]["top_logprobs"][context:-1]
    return sum(logprobs), all(own == max(top.values()) for own, top in zip(logprobs, tops, strict=True))


@torch.no_grad()
def expected(model: Any, prompt: list[int]) -> torch.Tensor:
    """Float32 [len - 1, vocabulary]: row i predicts token i + 1."""
    return torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1].float(), -1)


def own_logprobs(rows: torch.Tensor, prompt: list[int]) -> list[float]:
    found: list[float] = rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    return found


def test_loglikelihoods_are_those_of_transformers(system: System, model: Any) -> None:
    given = prompts()
    for _ in range(2):  # the second time all of it is cached
        for prompt, (context, _count), choice in zip(given, PAIRS, ask(system, given, max_tokens=1), strict=True):
            rows = expected(model, prompt)
            own = own_logprobs(rows, prompt)
            assert choice["logprobs"]["token_logprobs"][0] is None
            assert choice["logprobs"]["token_logprobs"][1:-1] == pytest.approx(own, abs=TOLERANCE)
            total, is_greedy = parsed(choice, context)
            assert total == pytest.approx(sum(own[context - 1 :]), abs=TOLERANCE * len(own))
            same(is_greedy, rows.argmax(-1).tolist()[context - 1 :] == prompt[context:], f"{len(prompt)} tokens")


def test_they_are_the_same_where_the_kv_moves_to_a_decode_worker(system: System, model: Any) -> None:
    moved = system.total("disagg_transfer_bytes_total")
    for prompt, choice in zip(prompts(), ask(system, prompts(), max_tokens=5, ignore_eos=True), strict=True):
        own = own_logprobs(expected(model, prompt), prompt)
        assert choice["logprobs"]["token_logprobs"][1 : len(prompt)] == pytest.approx(own, abs=TOLERANCE)
        assert len(choice["logprobs"]["token_logprobs"]) == len(prompt) + 5
    system.settle()
    assert system.total("disagg_transfer_bytes_total") > moved


def test_a_continuation_that_the_model_would_give_is_greedy(system: System, model: Any) -> None:
    """Control: the other continuations are random, and none of them is."""
    prompt = prompts()[2][:20]
    (choice,) = ask(system, [prompt], max_tokens=4, ignore_eos=True, return_token_ids=True)
    (again,) = ask(system, [prompt + choice["token_ids"]], max_tokens=1)
    assert parsed(again, len(prompt))[1]
    assert not parsed(ask(system, prompts()[2:3], max_tokens=1)[0], 20)[1]


def test_prompt_logprobs_have_the_rank_of_each_token(system: System, model: Any) -> None:
    prompt = prompts()[3]
    status, reply = system.complete(prompt, prompt_logprobs=2, max_tokens=1, temperature=0)
    assert status == 200, reply
    first, *entries = reply["choices"][0]["prompt_logprobs"]
    assert first is None
    rows = expected(model, prompt)
    for row, token_id, entry in zip(rows, prompt[1:], entries, strict=True):
        own = entry[str(token_id)]
        assert own["logprob"] == pytest.approx(float(row[token_id]), abs=TOLERANCE)
        assert (
            int((row > row[token_id] + TOLERANCE).sum()) < own["rank"] <= int((row > row[token_id] - TOLERANCE).sum())
        )
