"""A child never outlives its supervisor, not even one that was killed with -9.

Two mechanisms, because each has a hole. The kernel's parent-death signal reaches a child whose threads are all stuck,
but is lost if the parent dies before the child asks for it. The pipe that carried the secret stays open for as long as
the supervisor lives: reading its end also closes that race, but needs a running thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from typing import Final

from disagg.config.errors import ConfigError
from disagg.config.secret import NUM_SECRET_BYTES

PR_SET_PDEATHSIG: Final = 1  # <linux/prctl.h>


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends: nothing of ours lives outside this process's memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def secret_from_supervisor(fd: int) -> bytes:
    """Tie this process to the pipe's writer and read the secret from it. The pipe stays open; a thread watches it."""
    die_with_parent()
    secret = b""
    while len(secret) < NUM_SECRET_BYTES:
        part = os.read(fd, NUM_SECRET_BYTES - len(secret))
        if not part:
            raise ConfigError("the supervisor ended before it gave the secret")
        secret += part
    threading.Thread(target=_watch, args=(fd,), name="lifeline", daemon=True).start()
    return secret


def _watch(fd: int) -> None:
    os.read(fd, 1)  # returns only at the end of file: nothing is written after the secret
    os.kill(os.getpid(), signal.SIGKILL)
