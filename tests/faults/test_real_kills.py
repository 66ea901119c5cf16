"""kill -9 of each real process in every state of a transfer: an answer or an error in time, and nothing left behind.

`test_table.py` lets every fault happen in every state inside one process, where a kill is the end of its sockets. Here
router, prefill and decode worker are processes of their own, a transfer of theirs is stopped in the same states
(`support/faults/kill_cells.py`), and one of them gets SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import aiohttp
import pytest
from support.cluster.calls import Call
from support.cluster.hand_started import FAULTY
from support.cluster.kept import Kept
from support.cluster.system import System, running
from support.faults import kill_cells as kills
from support.faults.switches import Faults
from support.faults.table import ROWS, Row
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

from disagg.transceiver.protocol.state import Role, State

pytestmark = pytest.mark.timeout(240)  # processes start anew, on cores that may be shared

PROMISED_S = 5.0
PROMPT_LEN, NUM_TOKENS = 90, 6
FLAGS = (
    *("--dtype", "float32", "--block-size", "8", "--max-model-len", "200"),
    *("--max-num-seqs", "4", "--max-num-batched-tokens", "37"),  # three chunks
    *("--planes", "shm", "--no-enable-prefix-caching"),  # the same prompt again and again moves as a whole
)
IN_CI = (Role.RECEIVER, State.LANDING)
"""Of all rows: when bytes are landing, everybody holds something of the transfer."""


@dataclass(frozen=True)
class Case:
    row: Row
    system: System
    faults: Faults
    reference: Reference


class Cases:
    """A system for each row: `up` gives up a process that dies more than five times in a minute."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._model = save_family("gemma3", folders.mktemp("gemma3"))
        (self._reference,) = safe_prompts(build_family("gemma3"), (PROMPT_LEN,), NUM_TOKENS)
        self._row: Row | None = None
        self._kept: Kept[Case] | None = None

    def of(self, row: Row) -> Kept[Case]:
        if self._kept is None or self._row != row:
            self.close()
            self._row, self._kept = row, Kept(lambda: self._start(row))
        return self._kept

    @contextlib.contextmanager
    def _start(self, row: Row) -> Iterator[Case]:
        folder = self._folders.mktemp("faults")
        with running("--model", str(self._model), *FLAGS, program=(str(FAULTY), str(folder))) as system:
            yield Case(row, system, Faults(folder), self._reference)

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    made = Cases(tmp_path_factory)
    yield made
    made.close()


@pytest.fixture
def case(cases: Cases, row: Row, request: pytest.FixtureRequest) -> Iterator[Case]:
    with cases.of(row).lent_to(request.node) as case:
        yield case


def rows_and_names() -> list[object]:
    return [
        pytest.param(
            row,
            name,
            id=f"{row[0].value}-{row[1].value}-{name}",
            marks=[] if row == IN_CI else [pytest.mark.slow],
        )
        for row in ROWS
        for name in kills.PROCESSES
    ]


def pids(system: System) -> dict[str, int]:
    return {name: system.pid_of(name) for name in kills.PROCESSES}


async def play(case: Case, name: str, call: Call) -> float:
    """A request stands in the state, one process dies, the client hears of it; seconds from the kill to that."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        kills.begin(case.faults, case.row)
        asking = asyncio.create_task(call.run(session, case.system.url))
        try:
            await kills.stand(case.faults, case.row)
            assert not asking.done(), call
            os.kill(case.system.pid_of(name), signal.SIGKILL)
            killed_at = time.monotonic()
        finally:
            case.faults.set()
        await asking
    return call.ended_at - killed_at


def check_reply(case: Case, name: str, call: Call) -> None:
    answer = list(case.reference.token_ids)
    same(call.token_ids, answer[: len(call.token_ids)], call)
    if name == kills.ROUTER:
        assert call.cut, call
    elif name == kills.DECODE:
        assert call.status == 503, call  # nobody else emits tokens, and no token was out
    else:
        assert call.is_whole, call
        same(call.token_ids, answer, call)
        modes = [attempt["mode"] for attempt in case.system.record(call.request_id)["attempts"]]
        assert modes == kills.modes_after(case.row)


def wait_until_whole(system: System, dead: str = "") -> None:
    """Until whoever was killed is back, registered and linked: the `dead` incarnation may not be missed yet."""
    deadline = time.monotonic() + 60
    while True:
        system.wait_until_ready()
        known = system.workers()
        links = [link["state"] for worker in known for link in worker["links"]]
        is_missed = dead not in {worker["incarnation"] for worker in known}
        if is_missed and {worker["id"] for worker in known} == set(kills.WORKERS) and links == ["ready"]:
            return
        assert time.monotonic() < deadline, known
        time.sleep(0.05)


def serve_next(case: Case, name: str, dead: str) -> None:
    """Nothing of before holds a block, and what was started again does its part."""
    system = case.system
    wait_until_whole(system, dead)
    system.settle()
    system.wait_until_idle()
    options = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    status, body = system.complete(list(case.reference.prompt), request_id=name, **options)
    assert status == 200, body
    same(tuple(body["choices"][0]["token_ids"]), case.reference.token_ids)
    assert [attempt["mode"] for attempt in system.record(name)["attempts"]] == ["transfer"]


@pytest.mark.parametrize(("row", "name"), rows_and_names())
def test_a_process_that_is_killed_in_a_state_costs_an_attempt_or_an_error(case: Case, name: str) -> None:
    wait_until_whole(case.system)
    before, label = pids(case.system), f"{name}-{time.monotonic()}"
    incarnations = {worker["id"]: worker["incarnation"] for worker in case.system.workers()}
    call = Call(label, True, case.reference.prompt, NUM_TOKENS)
    seconds = asyncio.run(play(case, name, call))
    check_reply(case, name, call)
    serve_next(case, f"after-{label}", incarnations.get(name, ""))
    after = pids(case.system)
    same({process for process in kills.PROCESSES if before[process] != after[process]}, {name}, "started again")
    assert seconds < PROMISED_S, call


def test_every_state_of_the_table_has_a_halt() -> None:
    assert set(kills.HALTS) == set(ROWS)
