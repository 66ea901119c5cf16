"""`n` choices over router, prefill worker, one transfer and decode worker: the bytes of one prompt, no block left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.families import VOCAB_SIZE, build_family, save_family
from support.oracles.token_walk import minimum_nbytes, stored_layers

pytestmark = pytest.mark.processes

BLOCK_SIZE = 8
NUM_TOKENS = 10
LENGTHS = (5, 24, 33, 70)
"""Around the window of 24, whole blocks and blocks in part."""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder: Path = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    flags = ("--dtype", "float32", "--max-model-len", "512", "--block-size", str(BLOCK_SIZE))
    with running("--model", str(folder), "--max-num-seqs", "8", *flags) as system:
        yield system


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def ask(system: System, prompt: list[int], name: str, **options: Any) -> list[list[int]]:
    given = {"max_tokens": NUM_TOKENS, "temperature": 1.5, "ignore_eos": True, "seed": 5} | options
    status, reply = system.complete(prompt, request_id=name, **given)
    assert status == 200, reply
    return [choice["token_ids"] for choice in reply["choices"]]


def test_choices_move_one_prompt_and_equal_requests_of_their_own(system: System) -> None:
    layers = stored_layers(build_family("gemma3"), itemsize=4)
    for length in LENGTHS:
        prompt, name = prompt_of(length), f"n{length}"
        system.settle()
        before = system.total("disagg_prompt_tokens_computed_total")
        choices = ask(system, prompt, name, n=4, cache_salt=f"together {time.monotonic()}")
        assert system.record(name)["transfer"]["nbytes"] == sum(minimum_nbytes(layers, length, BLOCK_SIZE).values())
        system.settle()
        assert system.total("disagg_prompt_tokens_computed_total") == before + length
        alone = [
            ask(system, prompt, f"{name}-{i}", seed=5 + i, cache_salt=f"{i} {time.monotonic()}")[0] for i in range(4)
        ]
        same(choices, alone, f"prompt of {length}")
        assert len(set(map(tuple, choices))) > 1
    system.settle()
    system.wait_until_idle()


def test_more_choices_than_seats_beside_others_are_all_answered(system: System) -> None:
    with ThreadPoolExecutor(3) as pool:
        lists = list(pool.map(lambda i: ask(system, prompt_of(20 + i), f"many-{i}", n=6), range(3)))
    for i, choices in enumerate(lists):
        same(choices, [ask(system, prompt_of(20 + i), f"one-{i}-{k}", seed=5 + k)[0] for k in range(6)], f"{i}")
    system.settle()
    system.wait_until_idle()


def test_a_choice_that_its_stop_string_ends_frees_its_blocks(system: System) -> None:
    prompt = prompt_of(33)
    status, whole = system.complete(prompt, n=3, seed=5, temperature=1.5, max_tokens=40, ignore_eos=True)
    assert status == 200
    stop = next(text[4:6] for text in (choice["text"] for choice in whole["choices"]) if text[4:6].strip())
    status, cut = system.complete(prompt, n=3, seed=5, temperature=1.5, max_tokens=40, ignore_eos=True, stop=[stop])
    assert status == 200
    for choice, before in zip(cut["choices"], whole["choices"], strict=True):
        same(choice["text"], before["text"].split(stop)[0], stop)
    system.settle()
    system.wait_until_idle()


LONG = {"max_tokens": 450, "temperature": 1.5, "ignore_eos": True, "seed": 5, "n": 3, "return_token_ids": True}
"""So many tokens that a worker is killed before the last."""


async def streamed_until_killed(system: System, prompt: list[int]) -> tuple[list[list[int]], list[Any]]:
    """The ids of each choice and the errors in the stream; the decode worker dies when all choices have begun."""
    seen: list[list[int]] = [[], [], []]
    errors, is_killed = [], False
    body = {"prompt": prompt, "stream": True, **LONG}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
        session.post(f"{system.url}/v1/completions", json=body) as response,
    ):
        assert response.status == 200
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            errors += [event["error"]] if "error" in event else []
            for choice in event.get("choices", ()):
                seen[choice["index"]] += choice.get("token_ids") or ()
            if all(seen) and not is_killed:
                is_killed = True
                os.kill(system.pid_of("decode-0"), signal.SIGKILL)
    return seen, errors


@pytest.mark.anyio
async def test_a_killed_decode_worker_gives_no_choice_a_wrong_end(system: System) -> None:
    """Streamed: each choice is right as far as it goes, then an error. Whole: all choices complete, or an error."""
    await asyncio.to_thread(system.wait_until_ready)
    prompt = prompt_of(24)
    expected = await asyncio.to_thread(ask, system, prompt, "before", **LONG)
    whole = asyncio.create_task(asyncio.to_thread(system.complete, prompt, **LONG))
    seen, errors = await streamed_until_killed(system, prompt)
    for choice, answer in zip(seen, expected, strict=True):
        same(choice, answer[: len(choice)], "of a stream")
    assert [error["code"] for error in errors] == ["bad_gateway"], errors
    assert any(len(choice) < len(answer) for choice, answer in zip(seen, expected, strict=True))
    status, reply = await whole
    if status == 200:
        same([choice["token_ids"] for choice in reply["choices"]], expected, "of a whole answer")
    else:
        assert status in (502, 503), reply  # cut off in the middle, or no other worker to begin at
    await asyncio.to_thread(system.wait_until_ready)
    same(await asyncio.to_thread(ask, system, prompt, "after", **LONG), expected, "after the restart")
    await asyncio.to_thread(system.wait_until_idle)
