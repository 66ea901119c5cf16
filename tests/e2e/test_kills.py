"""kill -9 of each process while requests decode, transfer and prefill, streamed or not: nobody hangs or is deceived."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.cluster.calls import Call, until
from support.cluster.hand_started import FAULTY
from support.cluster.kept import Kept
from support.cluster.system import System, children_of, start, stop, wait_for_start
from support.faults.switches import Faults
from support.faults.wrong import never_late, same
from support.model.families import Reference, build_family, safe_prompts, save_family

from disagg.transceiver.wire.timing import LOST_S

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]  # processes start anew, on cores that may be shared

PROMISED_S = 5.0
NUM_TOKENS = 60
STEP_S, SLOW_STEP_S = 0.15, 0.5
"""Of a decoding step: until both answers have begun, and from then on, so that they last for half a minute."""
SHORT, MIDDLE, LONG = 9, 30, 330
FLAGS = (
    *("--dtype", "float32", "--block-size", "8", "--max-model-len", "400"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "37"),
)
PHASES = ("decode", "transfer", "prefill")
PLANES = ("shm", pytest.param("zmq", marks=pytest.mark.slow))
WORKERS = ("prefill-0", "decode-0")
PROCESSES = ("router", *WORKERS)


@dataclass(frozen=True)
class Case:
    system: System
    faults: Faults
    references: dict[str, Reference]
    """By the phase that a request with this prompt is in when a process dies."""


@pytest.fixture(scope="module", params=PLANES)
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept[Case]]:
    model = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    references = safe_prompts(build_family("gemma3"), (SHORT, MIDDLE, LONG), NUM_TOKENS)

    @contextlib.contextmanager
    def start_case() -> Iterator[Case]:
        """A test may have killed the supervisor at the end."""
        faults = Faults(tmp_path_factory.mktemp("faults"))
        flags = ("--model", str(model), *FLAGS, "--planes", request.param)
        system = start(*flags, program=(str(FAULTY), str(faults.folder)))
        try:
            wait_for_start(system)
            yield Case(system, faults, dict(zip(PHASES, references, strict=True)))
            if system.process.poll() is None:
                stop(system)
        finally:
            if system.process.poll() is None:
                system.process.kill()
            system.process.wait()
            system.close()

    kept = Kept(start_case, lambda case: case.system.process.poll() is not None)
    yield kept
    kept.close()


@pytest.fixture
def case(cases: Kept[Case], request: pytest.FixtureRequest) -> Iterator[Case]:
    with cases.lent_to(request.node) as case:
        yield case


@dataclass(frozen=True)
class Scene:
    """Two calls in each phase, one streamed, at the moment of the kill."""

    calls: dict[str, list[Call]]
    killed_at: float
    records: dict[str, Any]

    @property
    def all_calls(self) -> list[Call]:
        return [call for calls in self.calls.values() for call in calls]


async def play(case: Case, name: str, kill: Callable[[], None], go_on: Callable[[Scene], bool]) -> Scene:
    """Bring requests into each phase, kill, and wait for the promise and for the end of every call.

    What stopped them for that is released when `go_on` says so: what was announced to a transfer whose source died may
    still land from the memory that both share.
    """
    calls = {
        phase: [Call(f"{name}-{phase}-{kind}", kind == "stream", case.references[phase].prompt, NUM_TOKENS)
                for kind in ("stream", "whole")]
        for phase in PHASES
    }  # fmt: skip
    timeout = aiohttp.ClientTimeout(total=40)
    async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as tasks:

        def begin(phase: str) -> None:
            for call in calls[phase]:
                tasks.create_task(call.run(session, case.system.url))

        try:
            await set_scene(case, calls, begin)
            records = await asyncio.to_thread(records_of, case, calls)
            scene = Scene(calls, time.monotonic(), records)
            kill()
            case.faults.end("pause_decode")
            await until(lambda: go_on(scene), "the others to have noticed")
        finally:
            case.faults.set()
        await keep_promise(case, scene)
    return scene


async def set_scene(case: Case, calls: dict[str, list[Call]], begin: Callable[[str], None]) -> None:
    """Bytes stop where they land, and after both are there a step of the prompts still to compute stops: none of these
    calls leaves its phase, however long the others need. Decoding goes on, too slowly to end meanwhile."""
    case.faults.set(pause_decode={"seconds": STEP_S})
    begin("decode")
    await until(lambda: all(num_emitted(case, call) > 1 for call in calls["decode"]), "tokens of both answers")
    case.faults.set(pause_decode={"seconds": SLOW_STEP_S}, pause_landing={})
    begin("transfer")
    await until(lambda: is_landing(case, calls["transfer"]), "bytes of prompts that are computed")
    case.faults.add(pause_prefill={})
    begin("prefill")
    await until(lambda: is_computing(case, calls["prefill"]), "a step of prompts that the router knows")


def record_of(case: Case, call: Call) -> Any:
    """None until the router has it."""
    with contextlib.suppress(urllib.error.HTTPError):
        return case.system.record(call.request_id)
    return None


def records_of(case: Case, calls: dict[str, list[Call]]) -> dict[str, Any]:
    return {call.request_id: record_of(case, call) for calls_ in calls.values() for call in calls_}


def attempts_of(case: Case, call: Call) -> list[Any]:
    """None before it is placed."""
    record = record_of(case, call)
    return record["attempts"] if record else []


def num_emitted(case: Case, call: Call) -> int:
    record = record_of(case, call)
    return record["output_tokens"] if record else 0


def is_landing(case: Case, calls: list[Call]) -> bool:
    """Bytes have stopped where they land, and both transfers' prompts are computed."""
    is_computed = ["prefill-0" in attempt["stages"] for call in calls for attempt in attempts_of(case, call)]
    return case.faults.num_fired("pause_landing") > 0 and len(is_computed) == len(calls) and all(is_computed)


def is_computing(case: Case, calls: list[Call]) -> bool:
    return case.faults.num_fired("pause_prefill") > 0 and all(attempts_of(case, call) for call in calls)


async def keep_promise(case: Case, scene: Scene) -> None:
    """Within 5 s of the kill each call has a token, an error, or its next attempt."""
    waiting = list(scene.all_calls)
    while waiting:
        waiting = [call for call in waiting if not await asyncio.to_thread(has_news, case, scene, call)]
        passed = time.monotonic() - scene.killed_at
        assert not waiting or passed < PROMISED_S, (
            f"{[call.request_id for call in waiting]} heard nothing in {passed:.1f} s"
        )
        await asyncio.sleep(0.02)


def has_news(case: Case, scene: Scene, call: Call) -> bool:
    if call.ended_at or call.last_token_at > scene.killed_at:
        return True
    try:
        record = case.system.record(call.request_id)
    except OSError:  # the router is what was killed: then the client's own connection must tell
        return False
    before = scene.records[call.request_id]
    more_tokens = record["output_tokens"] > before["output_tokens"]
    return more_tokens or len(record["attempts"]) > len(before["attempts"]) or record["error"] is not None


def check_phases(scene: Scene) -> None:
    """The kill came when it should: tokens were out, bytes were landing, prompts were being computed."""
    for phase, calls in scene.calls.items():
        for call in calls:
            record = scene.records[call.request_id]
            (attempt,) = record["attempts"]
            assert (record["output_tokens"] > 0) == (phase == "decode"), record
            assert ("prefill-0" in attempt["stages"]) == (phase != "prefill"), record
            assert ("decode-0" in attempt["stages"]) == (phase == "decode"), record


@never_late()
def check_no_stream_ends_as_if_complete(case: Case, scene: Scene) -> None:
    for phase, calls in scene.calls.items():
        for call in calls:
            answer = list(case.references[phase].token_ids)
            assert call.token_ids == answer[: len(call.token_ids)], call
            assert call.is_whole == (len(call.token_ids) == NUM_TOKENS), call
            assert call.is_whole or call.error or call.cut, call
            assert not (call.is_done and call.error), call


def pids(system: System) -> dict[str, int]:
    return {name: system.pid_of(name) for name in PROCESSES}


def serve_next(case: Case, name: str) -> None:
    """The restarted process does its part again, and nothing of before holds a block."""
    case.system.wait_until_ready()
    case.system.wait_until_idle()
    reference = case.references["transfer"]
    deadline = time.monotonic() + 30
    while {worker["id"] for worker in case.system.workers()} != set(WORKERS):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    prompt, options = list(reference.prompt), {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    status, body = case.system.complete(prompt, request_id=f"{name}-next", **options)
    assert status == 200, body
    same(tuple(body["choices"][0]["token_ids"]), reference.token_ids)
    assert [attempt["mode"] for attempt in case.system.record(f"{name}-next")["attempts"]] == ["transfer"]
    case.system.settle()
    case.system.wait_until_idle()


def at_once(scene: Scene) -> bool:
    return True


def kill_one(case: Case, name: str, go_on: Callable[[Scene], bool] = at_once) -> Scene:
    """Kill one process in the middle of it all; the others must live on under their own pids."""
    before = pids(case.system)
    survivors = [before[worker] for worker in WORKERS if worker != name]
    num_open = [len(traces_of(pid)) for pid in survivors]
    scene = asyncio.run(play(case, name, lambda: os.kill(before[name], signal.SIGKILL), go_on))
    check_phases(scene)
    check_no_stream_ends_as_if_complete(case, scene)
    serve_next(case, name)
    after = pids(case.system)
    assert {process for process in PROCESSES if before[process] != after[process]} == {name}
    assert [len(traces_of(pid)) for pid in survivors] == num_open  # connections and mappings to the dead are closed
    assert any(f"`{name}` was killed by SIGKILL" in line for line in case.system.stderr)
    return scene


def test_a_killed_prefill_worker_costs_no_answer(case: Case) -> None:
    def has_begun_anew(scene: Scene) -> bool:
        return all(
            len(attempts_of(case, call)) == 2 for phase in ("transfer", "prefill") for call in scene.calls[phase]
        )

    scene = kill_one(case, "prefill-0", has_begun_anew)
    for phase, calls in scene.calls.items():
        for call in calls:
            assert call.is_whole, call
            modes = [attempt["mode"] for attempt in case.system.record(call.request_id)["attempts"]]
            assert modes == (["transfer"] if phase == "decode" else ["transfer", "local"]), call.request_id


def test_a_killed_decode_worker_ends_its_answers_with_an_error(case: Case) -> None:
    scene = kill_one(case, "decode-0")
    for call in scene.calls["decode"]:
        assert call.error, call
        assert call.status == (200 if call.stream else 502), call
    for call in (*scene.calls["transfer"], *scene.calls["prefill"]):
        assert call.status == 503, call  # no other decode worker, and it is not back yet


def test_a_killed_router_cuts_its_connections_and_loses_no_worker(case: Case) -> None:
    scene = kill_one(case, "router")
    assert all(call.cut for call in scene.all_calls), scene.all_calls


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_that_stood_still_is_lost_and_comes_back_as_another(case: Case, name: str) -> None:
    """Not dead, and not to be confused with what it was: everything of its old incarnation is given up."""
    serve_next(case, f"before-{name}")
    before, worker_pids = incarnations(case.system), [case.system.pid_of(worker) for worker in WORKERS]
    num_open = [len(traces_of(pid)) for pid in worker_pids]
    os.kill(case.system.pid_of(name), signal.SIGSTOP)
    time.sleep(LOST_S + 1.5)
    assert name not in incarnations(case.system)
    os.kill(case.system.pid_of(name), signal.SIGCONT)
    serve_next(case, f"after-{name}")
    after = incarnations(case.system)
    assert {worker for worker in WORKERS if before[worker] != after[worker]} == {name}
    assert [case.system.pid_of(worker) for worker in WORKERS] == worker_pids
    assert [len(traces_of(pid)) for pid in worker_pids] == num_open


def incarnations(system: System) -> dict[str, str]:
    return {worker["id"]: worker["incarnation"] for worker in system.workers()}


def test_a_killed_up_takes_everything_with_it(case: Case) -> None:
    """The last test of this system."""
    supervisor = case.system.process
    children = children_of(supervisor.pid)
    assert sorted(children) == sorted(pids(case.system).values())
    traces = [trace for pid in (supervisor.pid, *children) for trace in traces_of(pid)]
    assert any(trace.startswith("socket:") for trace in traces)
    assert not [trace for trace in traces if trace.startswith("/dev/shm/")]
    scene = asyncio.run(play(case, "up", supervisor.kill, at_once))
    while left := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() - scene.killed_at < PROMISED_S, f"still there: {left}"
        time.sleep(0.02)
    check_phases(scene)
    check_no_stream_ends_as_if_complete(case, scene)
    assert all(call.cut for call in scene.all_calls)
    assert not set(traces) & {f"socket:[{inode}]" for inode in live_socket_inodes()}


def traces_of(pid: int) -> list[str]:
    """What this process has open: `socket:[inode]`, `/memfd:...`, files."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(descriptor.readlink()))
        except FileNotFoundError:
            continue
    return found


def live_socket_inodes() -> set[str]:
    """Inodes of all TCP and unix sockets that the kernel has."""
    unix = [line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    tcp = [
        line.split()[9] for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return set(unix) | set(tcp) - {"0"}
