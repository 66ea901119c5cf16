"""A terminal that has few letters, is closed early, and hangs up: `disagg up` goes on serving."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from support.cluster.system import ON_CPU, START_TIMEOUT_S, STOP_TIMEOUT_S, children_of

pytestmark = pytest.mark.processes

FLAGS = ("--port", "0", "--both", "1", "--prefill", "0", "--decode", "0", "--max-model-len", "128", "--threads", "1")
HANG_UP_S = 1.0  # a process that heeded SIGHUP began to stop within milliseconds


def test_a_terminal_takes_nothing_with_it_when_it_goes(tmp_path: Path) -> None:
    """`nohup` ignores SIGHUP, which every process inherits; `head -1` closes the pipe after the first line."""
    argv = ["nohup", sys.executable, "-P", "-m", "disagg", "up", *FLAGS, "--served-model-name", "modèle-🦙"]
    environ = {**os.environ, **ON_CPU, "PYTHONIOENCODING": "latin-1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, env=environ, start_new_session=True
        )
    try:
        assert process.stdout is not None
        first = process.stdout.readline().decode("latin-1")
        process.stdout.close()
        found = re.match(r"serving `modèle-\?` at (\S+) ", first)
        assert found, first
        pids = [process.pid, *children_of(process.pid)]
        assert len(pids) == 3
        for pid in pids:
            os.kill(pid, signal.SIGHUP)
        time.sleep(HANG_UP_S)
        with urllib.request.urlopen(f"{found[1]}/ready", timeout=START_TIMEOUT_S) as answer:
            assert answer.status == 200
        assert [process.pid, *children_of(process.pid)] == pids
        process.terminate()
        assert process.wait(STOP_TIMEOUT_S) == 128 + signal.SIGTERM
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()
