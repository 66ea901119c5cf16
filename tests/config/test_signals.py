"""Signals that end a process, those that were ignored on purpose, and PID 1."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from disagg.config.signals import ENDING, end_on_signals, heeded_signals, raise_on_interrupt


@pytest.fixture(autouse=True)
def _handlers_as_they_were() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ignored", ENDING)
def test_an_ignored_signal_is_not_heeded(ignored: signal.Signals) -> None:
    signal.signal(ignored, signal.SIG_IGN)
    assert heeded_signals() == [number for number in ENDING if number != ignored]


def test_only_pid_1_needs_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    end_on_signals()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "no traceback of an import"
    monkeypatch.setattr(os, "getpid", lambda: 1)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_on_signals()
    assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    raise_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_signal_ends_a_process_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os; os.getpid = lambda: 1\nfrom disagg.config.signals import end_on_signals; end_on_signals()\n"
        "print(flush=True)\nwhile True: pass"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM


HELD_IN_AN_IMPORT = """
import builtins, time
import disagg.__main__ as command

real = builtins.__import__

def held(name, *rest):
    if name == "disagg.cli.main":
        print(flush=True)
        time.sleep(60)
    return real(name, *rest)

builtins.__import__ = held
command.run()
"""


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root and `unshare`")
@pytest.mark.parametrize("number", ENDING)
def test_pid_1_obeys_before_it_has_loaded_anything(number: signal.Signals) -> None:
    argv = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-P", "-c", HELD_IN_AN_IMPORT]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"\n":
            pytest.skip("this sandbox makes no PID namespace")
        (child,) = children(process.pid)
        os.kill(child, number)
        began_at = time.monotonic()
        assert process.wait(timeout=30) == 128 + number
        assert time.monotonic() - began_at < 20


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
