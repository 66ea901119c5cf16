"""Prefix reuse through the real system: what is moved is exactly what the decode worker lacks, per layer group."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cluster.system import System, running
from support.model.families import build_family, save_family
from support.oracles.token_walk import StoredLayer, minimum_nbytes, needed_blocks, stored_layers

pytestmark = pytest.mark.processes

T, WINDOW, NUM_TOKENS = 8, 24, 12
FLAGS = (
    *("--dtype", "float32", "--block-size", str(T), "--max-model-len", "256"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "37"),  # pools for 8 sequences; chunks start inside blocks
)


@dataclass
class Chat:
    """Asks by token ids, and knows what each answer moved."""

    system: System
    layers: list[StoredLayer]
    num_asked: int = 0

    def ask(self, prompt: list[int], **fields: Any) -> tuple[list[int], Any, int]:
        """Token ids of the answer, its transfer record, cached tokens."""
        self.num_asked += 1
        name = f"r{self.num_asked}"
        status, body = self.system.complete(
            prompt, request_id=name, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, **fields
        )
        assert status == 200, body
        cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        return body["choices"][0]["token_ids"], self.system.record(name)["transfer"], cached

    def least(self, prompt_len: int, num_held: int, *, windowed_held: bool = True) -> Counter[int | None]:
        """Bytes by window when the receiver has the first `num_held` blocks (of windowed layers too, or none)."""
        total: Counter[int | None] = Counter()
        for layer in self.layers:
            held = num_held if windowed_held or layer.window is None else 0
            blocks = {block for block in needed_blocks(prompt_len, layer.window, T) if block >= held}
            total[layer.window] += len(blocks) * T * layer.token_nbytes
        return total


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    folder: Path = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    with running("--model", str(folder), *FLAGS) as system:
        yield Chat(system, stored_layers(build_family("gemma3"), itemsize=4))


def words(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(3, 211), k=count)


def moved(transfer: Any) -> Counter[int | None]:
    by_window: Counter[int | None] = Counter()
    for group in transfer["groups"]:
        by_window[WINDOW if group["name"].startswith("window") else None] += group["nbytes"]
    return by_window


def test_each_turn_of_a_chat_moves_and_computes_only_what_is_new(chat: Chat) -> None:
    prompt, num_stored, last_len = words(1, 61), 0, 0
    for turn in range(3):
        answer, transfer, cached = chat.ask(prompt)
        assert moved(transfer) == chat.least(len(prompt), num_stored // T), f"turn {turn}"
        assert cached == last_len // T * T
        fresh, transfer, cached = chat.ask(prompt, cache_salt=f"turn {turn}")
        assert fresh == answer
        assert (moved(transfer), cached) == (minimum_nbytes(chat.layers, len(prompt), T), 0)
        last_len, num_stored = len(prompt), len(prompt) + NUM_TOKENS - 1  # the last token's KV is never computed
        prompt = prompt + answer + words(10 + turn, 9)


def test_a_prompt_that_is_held_whole_moves_nothing(chat: Chat) -> None:
    prompt = words(2, 64)
    answer, transfer, _ = chat.ask(prompt)
    assert moved(transfer) == minimum_nbytes(chat.layers, 64, T)
    again, transfer, cached = chat.ask(prompt)
    assert again == answer
    assert (sum(moved(transfer).values()), transfer["num_blocks"], cached) == (0, 0, 56)


def test_the_same_prompt_under_another_salt_finds_nothing(chat: Chat) -> None:
    prompt = words(5, 64)
    answer, *_ = chat.ask(prompt, cache_salt="one")
    for salt in ({"cache_salt": "other"}, {}):
        again, transfer, cached = chat.ask(prompt, **salt)
        assert again == answer
        assert (moved(transfer), cached) == (minimum_nbytes(chat.layers, 64, T), 0), salt
    again, transfer, cached = chat.ask(prompt, cache_salt="one")  # the control: under its own it finds all there is
    assert again == answer
    assert (sum(moved(transfer).values()), cached) == (0, 56)


def test_a_windowed_miss_with_a_full_hit_moves_only_the_windowed_blocks(chat: Chat) -> None:
    prompt = words(3, 96)
    answer, *_ = chat.ask(prompt)
    for seed in range(100, 130):  # short prompts fill the windowed pool long before the full one
        chat.ask(words(seed, 17))
    again, transfer, cached = chat.ask(prompt)
    assert again == answer
    expected = chat.least(96, 96 // T, windowed_held=False)
    assert expected[None] == 0 < expected[WINDOW]
    assert moved(transfer) == expected
    assert cached == 0  # to go on computing, prefill needs the windows too


def test_after_eviction_everything_is_moved_again_and_the_answer_is_the_same(chat: Chat) -> None:
    prompt = words(4, 80)
    answer, *_ = chat.ask(prompt)
    for seed in range(200, 216):
        chat.ask(words(seed, 230))
    again, transfer, cached = chat.ask(prompt)
    assert again == answer
    assert (moved(transfer), cached) == (minimum_nbytes(chat.layers, 80, T), 0)
    _, transfer, cached = chat.ask([*prompt, *answer[:-1], 5])
    assert cached == 80
    assert moved(transfer) == chat.least(80 + NUM_TOKENS, (80 + NUM_TOKENS - 1) // T)


def test_hits_evictions_and_cached_blocks_are_counted(chat: Chat) -> None:
    system = chat.system
    system.settle()
    system.wait_until_idle()
    for worker in ("prefill-0", "decode-0"):
        for group in ("full", f"window-{WINDOW}"):
            hits = system.total("disagg_prefix_hits_total", worker=worker, group=group)
            assert 0 < hits < system.total("disagg_prefix_queries_total", worker=worker, group=group)
        for pool in ("0", "1"):
            assert system.total("disagg_kv_evictions_total", worker=worker, pool=pool) > 0
            assert system.total("disagg_kv_blocks_cached", worker=worker, pool=pool) > 0
