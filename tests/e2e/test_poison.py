"""A request that ends each worker that computes it, in real processes: two of them, and no other answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.cluster.hand_started import FAULTY
from support.cluster.system import System, running
from support.faults.switches import Faults

pytestmark = [pytest.mark.processes, pytest.mark.slow]

POISON = 401
"""A token that no other prompt here has."""

FLAGS = (
    *("--prefill", "3", "--decode", "1", "--dtype", "float32", "--block-size", "8", "--max-model-len", "400"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "64"),
)
OPTIONS = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}


def prompt(number: int) -> list[int]:
    return [20 + (number * 7 + i) % 300 for i in range(40)]


def expected(system: System, count: int) -> list[list[int]]:
    return [system.complete(prompt(number), **OPTIONS)[1]["choices"][0]["token_ids"] for number in range(count)]


@pytest.mark.parametrize("raises", [False, True], ids=["killed", "exception"])
def test_a_poisonous_request_ends_two_workers_at_most_and_no_other_answer(tmp_path: Path, raises: bool) -> None:
    folder = tmp_path / "faults"
    folder.mkdir()
    faults = Faults(folder)
    with running(*FLAGS, program=(str(FAULTY), str(folder))) as system, ThreadPoolExecutor(8) as clients:
        wanted = expected(system, 6)
        pids = {worker["id"]: worker["pid"] for worker in system.workers()}
        faults.set(
            poison={"byte": POISON, "raises": raises, "times": 9},
            pause_decode={"seconds": 0.05, "times": 60},
            pause_prefill={"seconds": 0.02, "times": 60},
        )
        answers = [clients.submit(system.complete, prompt(number), **OPTIONS) for number in range(3)]
        poisonous = clients.submit(system.complete, [*prompt(9), POISON], request_id="poisonous", **OPTIONS)
        answers += [clients.submit(system.complete, prompt(number), **OPTIONS) for number in range(3, 6)]
        status, body = poisonous.result()
        assert status == 500, body
        assert "ended while they computed this request" in body["error"]["message"]
        for number, answer in enumerate(answers):
            status, body = answer.result()
            assert status == 200, (number, body)
            assert body["choices"][0]["token_ids"] == wanted[number]
        assert faults.num_fired("poison") == 2
        assert len(system.record("poisonous")["charged_deaths"]) == 2
        assert system.total("disagg_requests_refused_after_deaths_total") == 1
        system.wait_until_ready()
        now = {worker["id"]: worker["pid"] for worker in system.workers() if worker["id"] in pids}
        assert now["decode-0"] == pids["decode-0"]
        faults.set()
        assert system.complete(prompt(0), **OPTIONS)[1]["choices"][0]["token_ids"] == wanted[0]
