"""`disagg up --api-processes 2` with real workers: what one process answers, two answer; what ends, ends everywhere."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.cluster.system import System, children_of, running

PROMPT = [40 + i % 60 for i in range(300)]


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with running("--api-processes", "2", "--max-model-len", "2048") as system:
        yield system


@pytest.fixture(scope="module")
def expected() -> list[int]:
    with running("--api-processes", "0", "--max-model-len", "2048") as system:
        return answer_of(system)


def answer_of(system: System) -> list[int]:
    status, body = system.complete(PROMPT, max_tokens=24, temperature=0, ignore_eos=True)
    assert status == 200, body
    return list(body["choices"][0]["token_ids"])


def api_pids(system: System) -> list[int]:
    """The router has other processes beside it: its index, and helpers."""
    children = children_of(system.pid_of("router"))
    return [pid for pid in children if b"api_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def stream(system: System) -> http.client.HTTPConnection:
    """A stream of 1,500 tokens whose first event came."""
    address = urlsplit(system.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    body = {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    assert response.readline().startswith(b"data: ")
    return connection


def test_two_processes_answer_as_one(system: System, expected: list[int]) -> None:
    for _ in range(4):
        assert answer_of(system) == expected


def test_a_client_that_leaves_frees_the_workers(system: System) -> None:
    stream(system).close()
    system.wait_until_idle()


def test_killed_api_processes_free_the_workers_and_come_back(system: System, expected: list[int]) -> None:
    connection, pids = stream(system), api_pids(system)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while len(set(api_pids(system)) - set(pids)) < 2:
        assert time.monotonic() < deadline, system.stderr[-20:]
        time.sleep(0.1)
    system.wait_until_idle()
    assert answer_of(system) == expected
    assert system.total("disagg_api_restarts_total") == 2
    connection.close()
