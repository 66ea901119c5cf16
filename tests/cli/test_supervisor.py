"""The supervisor over real, tiny processes: every way out ends every child, a dead child comes back within bounds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.cluster.fake_children import (
    DYING,
    LOGGING,
    READY_THEN_DYING,
    REFUSING,
    SECRET,
    SERVE,
    SPEAKING_NONSENSE,
    STUBBORN,
    FakeCluster,
    Recording,
    is_alive,
)

from disagg.cli import restarts
from disagg.cli.supervisor import ClusterError, Ready, Supervisor, Work
from disagg.config.errors import ConfigError

TIMEOUT_S = 60.0  # a hang, on two shared cores


@pytest.fixture
def shown() -> Recording:
    return Recording()


@pytest.fixture(autouse=True)
def _quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_DELAY_S", 0.001)


def run(cluster: FakeCluster, shown: Recording, work: Work, *, grace_s: float = 5.0) -> int:
    async def bounded() -> int:
        async with asyncio.timeout(TIMEOUT_S):
            return await Supervisor(cluster, SECRET, shown, grace_s=grace_s).run(work)

    return asyncio.run(bounded())


def ends_at_once(pids: list[int]) -> Work:
    async def work(router: Ready, workers: Sequence[Ready]) -> int:
        pids.extend(ready["pid"] for ready in (router, *workers))
        return 7

    return work


def signals(pids: list[int], *signums: signal.Signals) -> Work:
    """Remember the children, then send ourselves the signals, 50 ms apart."""

    async def work(router: Ready, workers: Sequence[Ready]) -> int:
        pids.extend(ready["pid"] for ready in (router, *workers))
        loop = asyncio.get_running_loop()
        for number, signum in enumerate(signums):
            loop.call_later(0.05 * number, os.kill, os.getpid(), signum)
        await asyncio.Event().wait()
        return 0

    return work


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (what is awaited is another process)
        await asyncio.sleep(0.01)


def visible(pid: int) -> bytes:
    """What other processes of this user see of a process's start."""
    return b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_workers_start_before_the_router_is_ready() -> None:
    """The router waits for a worker's file, so that waiting for the router first would wait for ever."""
    with tempfile.TemporaryDirectory() as folder:
        mark = f"{folder}/started"
        waiting = f"import pathlib\nwhile not pathlib.Path({mark!r}).exists(): time.sleep(0.01)\n"
        starting = f"import pathlib; pathlib.Path({mark!r}).touch(); "
        cluster = FakeCluster(waiting + SERVE, {"decode-0": starting + SERVE})
        assert run(cluster, Recording(), ends_at_once([])) == 7


def test_the_work_s_result_is_the_exit_code_and_every_child_ends(shown: Recording) -> None:
    pids: list[int] = []
    assert run(FakeCluster(), shown, ends_at_once(pids)) == 7
    assert len(pids) == 3
    assert not any(map(is_alive, pids))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no zombie


def test_nothing_stays_open(shown: Recording) -> None:
    run(FakeCluster(), shown, ends_at_once([]))
    before = open_fds()
    run(FakeCluster(), shown, ends_at_once([]))
    assert open_fds() == before


def test_children_get_the_secret_through_a_pipe_and_not_in_argv(shown: Recording) -> None:
    async def work(router: Ready, workers: Sequence[Ready]) -> int:
        for ready in (router, *workers):
            assert ready["secret"] == SECRET.decode()
            assert SECRET not in visible(ready["pid"])
        return 0

    assert run(FakeCluster(), shown, work) == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_child_cleanly(shown: Recording, signum: signal.Signals) -> None:
    pids: list[int] = []
    assert run(FakeCluster(), shown, signals(pids, signum)) == 128 + signum
    assert shown.said(f"{signum.name}: stopping")
    assert not any(map(is_alive, pids))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_period(shown: Recording) -> None:
    pids: list[int] = []
    cluster = FakeCluster(worker_bodies={"prefill-0": STUBBORN})
    assert run(cluster, shown, signals(pids, signal.SIGTERM), grace_s=0.2) == 128 + signal.SIGTERM
    assert not any(map(is_alive, pids))


def test_a_second_signal_ends_everything_at_once(shown: Recording) -> None:
    pids: list[int] = []
    cluster = FakeCluster(worker_bodies={"prefill-0": STUBBORN})
    start = time.monotonic()
    assert run(cluster, shown, signals(pids, signal.SIGINT, signal.SIGINT), grace_s=60) == 128 + signal.SIGINT
    assert time.monotonic() - start < TIMEOUT_S
    assert not any(map(is_alive, pids))


def test_a_signal_while_children_start_ends_them(shown: Recording) -> None:
    async def never(router: Ready, workers: Sequence[Ready]) -> int:
        raise AssertionError("not all are ready")

    async def main() -> int:
        supervisor = Supervisor(FakeCluster(worker_bodies={"prefill-0": "signal.pause()"}), SECRET, shown)
        task = asyncio.create_task(supervisor.run(never))
        await until(lambda: "prefill-0" in supervisor.children)
        pid = supervisor.children["prefill-0"].pid
        os.kill(os.getpid(), signal.SIGTERM)
        code = await task
        assert not is_alive(pid)
        return code

    assert asyncio.run(asyncio.wait_for(main(), TIMEOUT_S)) == 128 + signal.SIGTERM


def test_a_killed_worker_is_named_and_started_again(shown: Recording) -> None:
    async def work(router: Ready, workers: Sequence[Ready]) -> int:
        os.kill(workers[0]["pid"], signal.SIGKILL)
        await until(lambda: shown.lines.count("prefill-0: ready") == 2)
        return 0

    assert run(FakeCluster(), shown, work) == 0
    assert shown.said("`prefill-0` was killed by SIGKILL: restarting it in ")
    assert shown.lines.count("decode-0: ready") == 1


def test_a_killed_router_is_started_again_with_what_it_had_announced(shown: Recording) -> None:
    cluster = FakeCluster()

    async def work(router: Ready, workers: Sequence[Ready]) -> int:
        os.kill(router["pid"], signal.SIGKILL)
        await until(lambda: shown.lines.count("router: ready") == 2)
        return router["pid"] == cluster.router_told[1]["pid"]

    assert run(cluster, shown, work) == 1
    assert cluster.router_told[0] is None


def test_a_child_that_dies_again_and_again_ends_the_run(shown: Recording) -> None:
    async def forever(router: Ready, workers: Sequence[Ready]) -> int:
        await asyncio.Event().wait()
        return 0

    with pytest.raises(ClusterError, match="`decode-0` was killed by SIGKILL, after 5 restarts in 60 s"):
        run(FakeCluster(worker_bodies={"prefill-0": SERVE, "decode-0": READY_THEN_DYING}), shown, forever)
    assert sum("restarting it" in line for line in shown.lines) == 5


@pytest.mark.parametrize("bodies", [{"decode-0": REFUSING}, {"prefill-0": SERVE, "decode-0": REFUSING}])
def test_a_child_that_refuses_what_the_user_gave_ends_the_run_with_its_sentence(
    shown: Recording, bodies: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match=r"^the model is too large$"):
        run(FakeCluster(worker_bodies=bodies), shown, ends_at_once([]))
    assert not shown.said("restarting")


def test_a_router_that_refuses_what_the_user_gave_ends_the_run(shown: Recording) -> None:
    with pytest.raises(ConfigError, match="too large"):
        run(FakeCluster(router_body=REFUSING), shown, ends_at_once([]))


def test_exit_code_2_without_a_sentence_is_an_accident_like_any_other(shown: Recording) -> None:
    with pytest.raises(ClusterError, match=r"`router` exited with code 2 before it was ready$"):
        run(FakeCluster(router_body="sys.exit(2)"), shown, ends_at_once([]))


def test_a_sentence_that_could_only_be_printed_is_a_refusal_too(shown: Recording) -> None:
    body = "print('disagg: `--x` is `y`', file=sys.stderr, flush=True); sys.exit(2)"
    with pytest.raises(ConfigError, match=r"^`--x` is `y`$"):
        run(FakeCluster(router_body=body), shown, ends_at_once([]))


NEVER_READY = {
    "killed": (DYING, "`decode-0` was killed by SIGKILL before it was ready$"),
    "killed by a signal without a name": ("os.kill(os.getpid(), 40)", "`decode-0` was killed by signal 40 before it"),
    "crashed": ("import ctypes; ctypes.string_at(0)", "`decode-0` was killed by SIGSEGV before it was ready"),
    "ended": ("sys.exit(0)", "`decode-0` exited with code 0 before it was ready$"),
    "out of words": (
        "print('at last'); print(); sys.exit(1)",
        "`decode-0` exited with code 1 before it was ready: at last$",
    ),
    "announced": (
        "announce({'event': 'error', 'message': 'OSError: x'}); print('later'); sys.exit(1)",
        "`decode-0` exited with code 1 before it was ready: OSError: x$",
    ),
}


@pytest.mark.parametrize("case", NEVER_READY)
@pytest.mark.parametrize("router", [False, True])
def test_a_child_that_ends_before_it_was_ready_ends_the_run_at_once_with_its_last_words(
    shown: Recording, case: str, router: bool
) -> None:
    body, words = NEVER_READY[case]
    cluster = FakeCluster(router_body=body) if router else FakeCluster(worker_bodies={"decode-0": body})
    with pytest.raises(ClusterError, match=words.replace("decode-0", "router") if router else words):
        run(cluster, shown, ends_at_once([]))
    assert not shown.said("restarting")


def test_the_last_words_of_a_child_are_clipped(shown: Recording) -> None:
    with pytest.raises(ClusterError) as caught:
        run(FakeCluster(router_body="print('x' * 100_000); sys.exit(1)"), shown, ends_at_once([]))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_ignored_on_purpose_stays_ignored(shown: Recording, ignored: signal.Signals) -> None:
    """`nohup` ignores SIGHUP, a shell's `&` SIGINT."""
    other = signal.SIGTERM if ignored is not signal.SIGTERM else signal.SIGINT
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        assert run(FakeCluster(), shown, signals([], ignored, other)) == 128 + other
        assert signal.getsignal(ignored) is signal.SIG_IGN
    finally:
        signal.signal(ignored, before)
    assert not shown.said(ignored.name)


def test_an_error_in_the_work_ends_every_child_and_is_raised(shown: Recording) -> None:
    pids: list[int] = []

    async def work(router: Ready, workers: Sequence[Ready]) -> int:
        pids.append(router["pid"])
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        run(FakeCluster(), shown, work)
    assert not is_alive(pids[0])


def test_what_children_write_is_shown_as_it_is(shown: Recording) -> None:
    run(FakeCluster(router_body=LOGGING), shown, ends_at_once([]))
    assert "to stdout" in shown.lines
    assert "to stderr" in shown.lines


def test_announcements_that_are_none_are_passed_over(shown: Recording) -> None:
    assert run(FakeCluster(router_body=SPEAKING_NONSENSE), shown, ends_at_once([])) == 7


SUPERVISOR_PROCESS = """
import asyncio, sys
from support.cluster.fake_children import FakeCluster, SECRET, STUBBORN
from disagg.cli.display import PlainDisplay
from disagg.cli.supervisor import Supervisor

async def work(router, workers):
    print(*(ready["pid"] for ready in (router, *workers)), flush=True)
    await asyncio.Event().wait()

cluster = FakeCluster(worker_bodies={"prefill-0": STUBBORN})
asyncio.run(Supervisor(cluster, SECRET, PlainDisplay(sys.stderr)).run(work))
"""


def test_children_end_with_a_supervisor_that_is_killed_with_9() -> None:
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    argv = [sys.executable, "-P", "-c", SUPERVISOR_PROCESS]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ) as supervisor:
        assert supervisor.stdout is not None
        pids = [int(word) for word in supervisor.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(is_alive, pids))
        supervisor.kill()
    deadline = time.monotonic() + TIMEOUT_S
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))


def test_a_child_whose_supervisor_died_before_it_looked_ends() -> None:
    """The kernel's signal is lost in this race; the end of the pipe is not."""
    body = (
        "import os, signal, sys\nfrom disagg.cli import lifeline\nlifeline.die_with_parent = lambda: None\n"
        "lifeline.secret_from_supervisor(int(sys.argv[1]))\nwhile True: signal.pause()"
    )
    read_end, write_end = os.pipe()
    os.write(write_end, SECRET)
    with subprocess.Popen([sys.executable, "-P", "-c", body, str(read_end)], pass_fds=(read_end,)) as orphan:
        os.close(read_end)
        os.close(write_end)
        assert orphan.wait(TIMEOUT_S) == -signal.SIGKILL
