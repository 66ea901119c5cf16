"""Where an abuse runs: beside the pair it is done to, and never before it, as on a machine of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

NICENESS = 10  # a tenth of a core where the pair wants all of them: the pair's loops are judged by when they run

T = TypeVar("T")


def aside(work: Callable[[], T]) -> T:
    """`work`, in a thread that yields the cores to all others; so do the threads that it starts."""
    with ThreadPoolExecutor(1, "abuse", initializer=_yield_cores) as pool:
        return pool.submit(work).result()


def _yield_cores() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
