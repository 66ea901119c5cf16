"""Where an abuse runs: beside the pair it is done to, and never before it, as on a machine of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

NICENESS = 10  # above the pair's own: a tenth of a core where the pair wants all of them

T = TypeVar("T")


def aside(work: Callable[[], T]) -> T:
    """`work`, in a thread that yields the cores to all others; so do the threads that it starts."""
    with ThreadPoolExecutor(1, "abuse", initializer=_yield_cores) as pool:
        return pool.submit(work).result()


def _yield_cores() -> None:
    thread = threading.get_native_id()
    os.setpriority(
        os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS
    )  # the kernel stops at 19
