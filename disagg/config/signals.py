"""Which signals end a process of ours."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Final

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def heeded_signals() -> list[signal.Signals]:
    """Those of `ENDING` that are not ignored. What started us ignored the others on purpose, so they stay ignored:
    `nohup` SIGHUP, a shell's `&` without job control SIGINT. Children inherit it."""
    return [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]


def end_on_signals() -> None:
    """Let signals end this process before a loop listens to them. Call it before anything heavy is imported.

    As PID 1 of a container a process has no default actions: the kernel drops a signal without a handler. Every other
    process is ended by the kernel itself, at once.
    """
    if os.getpid() == 1:
        for number in set(heeded_signals()) - {signal.SIGINT}:  # Python handles SIGINT from its own start on
            signal.signal(number, end_now)


def end_now(number: int, _frame: FrameType | None) -> None:
    """As a shell reports a process that a signal ended. Nothing of ours outlives the process's memory."""
    os._exit(128 + number)
