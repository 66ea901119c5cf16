"""The forks that tests use in place of fresh processes: alike in all that a process can tell of itself, but warm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cluster import describe_process
from support.cluster.warm import WarmPopen
from support.cluster.warm_parent import READ_AT_IMPORT, can_stand_for

pytestmark = pytest.mark.processes

PROGRAM = str(Path(describe_process.__file__))
DISAGG = [sys.executable, "-P", "-m", "disagg"]
ENVIRON = {name: os.environ[name] for name in ("PATH", *READ_AT_IMPORT) if name in os.environ} | {
    "DISAGG_CHECK": "1",
    "LC_CTYPE": "C.UTF-8",  # which python itself puts there in an environment without a locale
    "PYTHONIOENCODING": "utf-8:backslashreplace",
}


def said(start: type[subprocess.Popen[Any]], folder: Path) -> list[dict[str, Any]]:
    """By a process and by one that it started."""
    argv = [sys.executable, "-P", PROGRAM, "one", "two"]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(argv, **pipes, text=True, cwd=folder, env=ENVIRON, start_new_session=True)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (7, "")
    return json.loads(out)  # type: ignore[no-any-return]


def test_a_fork_and_its_fork_are_as_fresh_processes_are(tmp_path: Path) -> None:
    assert said(WarmPopen, tmp_path) == said(subprocess.Popen, tmp_path)


def test_a_fork_has_loaded_torch_and_one_that_is_told_otherwise_has_not() -> None:
    def seconds_of_cpu(**environ: str) -> float:
        before = os.times()
        process = WarmPopen([*DISAGG, "version"], stdout=subprocess.PIPE, env={**os.environ, **environ})
        process.communicate(timeout=60)
        after = os.times()
        assert process.returncode == 0
        return after.children_user - before.children_user

    assert seconds_of_cpu() == 0.0  # not a child of this process
    assert seconds_of_cpu(DISAGG_KERNELS="torch") > 0.0


def test_a_fork_can_be_killed_and_waited_for() -> None:
    process = WarmPopen([*DISAGG, "up", "--port", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.wait(10) == process.poll() == -signal.SIGKILL
    assert not Path(f"/proc/{process.pid}").exists()


@pytest.mark.parametrize(
    ("argv", "environ", "can"),
    [
        (["-m", "disagg", "up"], {}, True),
        (["faulty_worker.py", "up"], {}, True),
        (["-m", "disagg.cli.api_process", "7", "8", "info"], {}, True),
        (["-m", "disagg.bench"], {}, False),
        (["-c", "pass"], {}, False),
        (["-m", "disagg", "up"], {"DISAGG_NATIVE": "off"}, False),
    ],
)
def test_only_our_commands_in_a_like_environment_are_forked(
    argv: list[str], environ: dict[str, str], can: bool
) -> None:
    assert can_stand_for([sys.executable, "-P", *argv], {**os.environ, **environ}) is can
    assert not can_stand_for([sys.executable, *argv], {**os.environ, **environ})
