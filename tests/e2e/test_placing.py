"""Where requests go in a real system: short prompts to the worker that decodes them, chats to where their KV is."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.cluster.system import System, children_of, running

pytestmark = pytest.mark.processes

BOUND = 64
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def pair() -> Iterator[System]:
    with running("--prefill", "2", "--decode", "1", "--max-local-prefill", str(BOUND)) as system:
        yield system


def words(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(300, 2000), k=count)


def ask(system: System, prompt: list[int], name: str) -> tuple[list[int], Any]:
    """The answer's token ids, and the attempt that gave it."""
    status, body = system.complete(prompt, request_id=name, max_tokens=6, temperature=0, return_token_ids=True)
    assert status == 200, body
    (attempt,) = system.record(name)["attempts"]
    return body["choices"][0]["token_ids"], attempt


def ask_until_known(system: System, prompt: list[int], name: str, num_tokens: int) -> Any:
    """Ask until the estimate counts at most so many tokens to compute: blocks are told twice a second."""
    deadline = time.monotonic() + PATIENCE_S
    for number in range(10**6):
        _, attempt = ask(system, prompt, f"{name}-{number}")
        if attempt["estimate"]["computed_tokens"] <= num_tokens:
            return attempt
        assert time.monotonic() < deadline, attempt
        time.sleep(0.1)
    raise AssertionError


def test_short_prompts_of_an_idle_pair_are_computed_where_they_are_decoded_and_long_ones_are_not(pair: System) -> None:
    modes = {length: ask(pair, words(length, length), f"of-{length}")[1]["mode"] for length in (400, 401, 402)}
    assert set(modes.values()) == {"transfer"}
    short = [ask(pair, words(number, 24), f"short-{number}")[1] for number in range(6)]
    assert "serve" in {attempt["mode"] for attempt in short}
    assert all(attempt["decode"] == "decode-0" for attempt in short)
    ratio = pair.total("disagg_ttft_estimate_ratio_count")
    assert ratio == 9, "each was estimated"


def test_a_chat_goes_where_its_blocks_are_and_answers_right_when_the_index_is_emptied(pair: System) -> None:
    first = words(7, 320)
    answer, _ = ask(pair, first, "turn-1")
    turn = [*first, *answer, *words(8, 20)]
    known = ask_until_known(pair, turn, "turn-2", BOUND)
    assert known["estimate"]["computed_tokens"] < 64, "whole blocks of turn 1 are not counted"
    expected, _ = ask(pair, turn, "turn-2-again")
    os.kill(index_pid(pair), signal.SIGKILL)
    emptied, attempt = ask(pair, turn, "turn-2-emptied")
    assert emptied == expected
    assert attempt["outcome"] == "finished"
    ask_until_known(pair, turn, "turn-2-told-anew", BOUND)
    assert pair.total("disagg_index_starts_total") == 2


def index_pid(system: System) -> int:
    """The router's child that keeps the index."""
    for pid in children_of(router_pid(system)):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"disagg.router.index.process" in file.read():
                return pid
    raise AssertionError("no index process")


def router_pid(system: System) -> int:
    return system.pid_of("router")
