"""Each check of this folder fails where there is something to find."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from support.abuse import guest
from support.abuse.aside import NICENESS, aside
from support.abuse.bodies import KINDS, NUM_BYTES
from support.abuse.clients import newcomers
from support.abuse.flawed_server import BREAKS, LIES, REFUSES, STALLS, STOPS, flawed_server
from support.abuse.fuzz import fault_of
from support.abuse.guest import Guests
from support.abuse.honest import Ask, Honest
from support.abuse.insider import forms
from support.abuse.loop_lag import LoopLags
from support.abuse.mutants import changes
from support.abuse.pair import Door, doors_of
from support.abuse.vitals import MAX_MORE_FDS, MAX_MORE_NBYTES, MAX_MORE_THREADS, MAX_MORE_WARM_NBYTES, Vitals, leaks
from support.abuse.watch import MAX_GAP_S, Report, judge_lags, judge_processes, judge_streams
from support.faults.wrong import Wrong
from support.links.sample_messages import GEOMETRY, IDENTITY

from disagg.transceiver.wire.messages.peer import Hello

ASKS = [Ask((number, 2, 3), 30, tuple(range(5))) for number in range(2)]


# --- streams ------------------------------------------------------------------------------------------------


def watched(flaw: str) -> Report:
    with flawed_server(flaw) as server:
        honest = Honest(server.url, ASKS)
        try:
            server.wait_until_seen(len(ASKS))
            return judge_streams(honest.stop(), began_at=0)
        finally:
            honest.kill()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flaw", "found"),
    [
        (STALLS, "s between two tokens"),
        (BREAKS, "an honest stream broke"),
        (STOPS, "an honest stream broke"),
        (REFUSES, "status 503"),
    ],
)
def test_the_watch_sees_a_stream_that(flaw: str, found: str) -> None:
    report = watched(flaw)
    assert any(found in fault for fault in report.late), report
    with pytest.raises(AssertionError):
        report.check()


@pytest.mark.processes
def test_a_wrong_answer_is_never_tried_again() -> None:
    with pytest.raises(Wrong, match="an honest answer is wrong"):
        watched(LIES).check()


@pytest.mark.processes
def test_the_watch_finds_nothing_in_streams_without_a_flaw() -> None:
    report = watched("")
    assert report == Report()


@pytest.mark.processes
def test_a_stall_counts_in_the_time_in_which_it_ended() -> None:
    with flawed_server(STALLS) as server:
        honest = Honest(server.url, ASKS)
        server.wait_until_seen(len(ASKS))
        seen = honest.stop()
    ended_at = max(at for at, seconds in seen.gaps if seconds > MAX_GAP_S)
    assert judge_streams(seen, began_at=ended_at - 0.1).late
    assert not judge_streams(seen, began_at=ended_at + 0.1).late


# --- processes ----------------------------------------------------------------------------------------------

LEAKER = """
import socket, sys, threading, time
kept = []
for line in sys.stdin:
    what, count = line.split()
    for _ in range(int(count)):
        if what == "sockets": kept.append(socket.socket())
        if what == "threads": threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        if what == "bytes": kept.append(b"x" * (1 << 20))
    print("done", flush=True)
"""


class Leaker:
    def __init__(self) -> None:
        command = [sys.executable, "-c", LEAKER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.keep("sockets", 0)

    def keep(self, what: str, count: int) -> Vitals:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what} {count}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"
        return Vitals.of(self.process.pid)


@pytest.fixture
def leaker() -> Iterator[Leaker]:
    made = Leaker()
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.mark.parametrize(
    ("what", "allowed", "found"),
    [
        ("sockets", MAX_MORE_FDS, "descriptors before"),
        ("threads", MAX_MORE_THREADS, "threads before"),
        ("bytes", (MAX_MORE_NBYTES >> 20) - 8, "MiB before"),
    ],
)
def test_a_leak_is_found_past_what_a_process_may_keep(leaker: Leaker, what: str, allowed: int, found: str) -> None:
    before = Vitals.of(leaker.process.pid)
    assert not leaks("it", before, leaker.keep(what, allowed))
    (leak,) = leaks("it", before, leaker.keep(what, 16))
    assert found in leak


def test_a_warm_process_may_grow_by_less(leaker: Leaker) -> None:
    before = Vitals.of(leaker.process.pid)
    warm = leaker.keep("bytes", 100)
    assert not leaks("it", before, leaker.keep("bytes", (MAX_MORE_WARM_NBYTES >> 20) - 8), warm)
    after = leaker.keep("bytes", 16)
    assert leaks("it", before, after, warm)
    assert not leaks("it", before, after)


def test_another_process_under_a_name_is_found(leaker: Leaker) -> None:
    before, other = Vitals.of(leaker.process.pid), Leaker()
    try:
        (fault,) = judge_processes({"it": before}, {"it": Vitals.of(other.process.pid)})
    finally:
        other.process.kill()
        other.process.communicate()
    assert "it is another process" in fault
    assert not judge_processes({"it": before}, {"it": Vitals.of(leaker.process.pid)})


def test_every_listening_socket_of_a_process_is_a_door() -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0a door of this test")
        unix.listen()
        doors = {tcp.getsockname(), "\0a door of this test"}
        assert doors <= {door.address for door in doors_of("me", os.getpid())}
    assert not doors & {door.address for door in doors_of("me", os.getpid())}


# --- loops --------------------------------------------------------------------------------------------------


def metrics(num_on_time: int, num_late: int, labels: str = "") -> str:
    total = num_on_time + num_late
    buckets = {"0.005": num_on_time, "0.05": num_on_time, "0.1": total, "+Inf": total}
    return "".join(f'disagg_loop_held_seconds_bucket{{{labels}le="{le}"}} {n}.0\n' for le, n in buckets.items())


def test_a_loop_that_is_late_in_one_tick_of_fifty_is_found() -> None:
    assert judge_lags(LoopLags.read(metrics(995, 5))) == ([], [])
    wrong, late = judge_lags(LoopLags.read(metrics(980, 20)))
    assert (len(wrong), len(late)) == (0, 1)


def test_of_a_few_ticks_one_may_be_late_and_two_are_found() -> None:
    assert judge_lags(LoopLags.read(metrics(50, 1))) == ([], [])
    assert judge_lags(LoopLags.read(metrics(50, 2)))[1]


def test_lags_before_the_abuse_do_not_count_and_each_loop_does() -> None:
    before = LoopLags.read(metrics(1000, 1000) + metrics(1000, 0, 'worker="a",'))
    after = LoopLags.read(metrics(3000, 1001) + metrics(1010, 10, 'worker="a",'))
    assert after.since(before).p99_s() == {(): 0.005, (("worker", "a"),): 0.1}


def test_a_process_that_tells_no_lag_is_found() -> None:
    assert judge_lags(LoopLags.read("disagg_requests_running 0\n"))[0]


# --- requests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "content_type", "data"),
    [
        (500, "application/json", b'{"error": {"message": "the server failed"}}'),
        (503, "application/json", b'{"error": {"message": "lost"}}'),
        (200, "application/json", b'{"choices": ['),
        (200, "text/event-stream", b'data: {"choices": []}\n\n'),
        (200, "text/event-stream", b'data: {"error": {"message": "lost"}}\n\ndata: [DONE]\n\n'),
    ],
)
def test_an_answer_that_is_none_is_found(status: int, content_type: str, data: bytes) -> None:
    assert fault_of(status, content_type, data)


def test_whole_answers_and_refusals_are_no_faults() -> None:
    assert not fault_of(200, "application/json", b'{"choices": []}')
    assert not fault_of(400, "application/json", b'{"error": {"message": "too long"}}')
    assert not fault_of(200, "text/event-stream", b'data: {"choices": []}\n\ndata: [DONE]\n\n')


@pytest.mark.parametrize("name", KINDS)
def test_the_largest_bodies_are_as_large_as_is_legal(name: str) -> None:
    assert NUM_BYTES - 64 <= len(KINDS[name][1]()) <= NUM_BYTES


# --- connections and peers ----------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_newcomer_that_gets_no_answer_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        door = Door("deaf", socket.AF_INET, deaf.getsockname())
        seen = asyncio.run(newcomers(door, 0.3, timeout_s=0.2))
    assert not seen.num_answered
    assert seen.faults


@pytest.mark.processes
def test_a_guest_that_is_not_welcomed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest, "CONTACT_TIMEOUT_S", 0.3)
    seen = Guests()
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoint = f"tcp://127.0.0.1:{deaf.getsockname()[1]}"
        asyncio.run(guest.visit(endpoint, Hello("0" * 32, "guest", IDENTITY, GEOMETRY, ("tcp",)), seen))
    assert seen.faults


def test_messages_have_each_field_at_its_extremes() -> None:
    for kind, form in forms("a" * 32, "b" * 32):
        changed = {change.path[0] for change in changes(form)}
        assert changed == set(form), kind
    found = [(c.path[-1], c.value) for _, form in forms("a" * 32, "b" * 32) for c in changes(form)]
    assert ("num_kv_heads", 0) in found
    assert ("deadline_s", float("inf")) in found


def test_an_abuse_yields_the_cores_and_the_test_itself_does_not() -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert aside(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) == min(19, own + NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own
    with pytest.raises(ZeroDivisionError):
        aside(lambda: 1 // 0)
