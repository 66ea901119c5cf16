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
    process is ended by the kernel itself, at once; but of SIGINT Python would make a traceback of the import it hits.
    """
    is_init = os.getpid() == 1
    for number in heeded_signals():
        if is_init:
            signal.signal(number, end_now)
        elif number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


def raise_on_interrupt() -> None:
    """Let SIGINT raise KeyboardInterrupt, from when there is something to clean up."""
    if signal.SIGINT in heeded_signals():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_now(number: int, _frame: FrameType | None) -> None:
    """As a shell reports a process that a signal ended. Nothing of ours outlives the process's memory."""
    os._exit(128 + number)
