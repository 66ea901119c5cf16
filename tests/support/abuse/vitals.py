"""What a process holds, from /proc: descriptors, threads, memory; and how much more it may hold after an abuse."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MAX_MORE_FDS = 8  # pools of clients and of the runtime open a few once and keep them; a leak grows by the connection
MAX_MORE_THREADS = 12  # executors make their threads when first needed, one by one up to a bound
MAX_MORE_WARM_NBYTES = 64 << 20
"""Of a process that did the same for a while already. oneDNN compiles a matmul for each number of rows, 0.5 MB each,
and keeps 1,024 of them: most are there by then, and what comes once more is a few tens of MiB."""
MAX_MORE_NBYTES = 256 << 20  # allocators keep what several large bodies needed at once; a leak goes on growing


@dataclass(frozen=True)
class Vitals:
    pid: int
    started_at: str  # in clock ticks after boot: another process under this pid has another
    num_fds: int
    num_threads: int
    nbytes: int
    """Memory of its own: what allocators gave out."""
    shared_nbytes: int
    """Of the pool, whose size is fixed at start; a page of it is counted from its first use on, which is no leak."""
    fds: Counter[str]
    unrun_s: float
    """How long the main thread, which is the event loop's, was ready to run and had no core."""

    @classmethod
    def of(cls, pid: int) -> Vitals:
        """Raises FileNotFoundError when there is no such process."""
        fds = fd_kinds(pid)
        status = Path(f"/proc/{pid}/status").read_text()
        number = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+)", status, re.MULTILINE)}
        memory = (number["RssAnon"] * 1024, number["RssShmem"] * 1024)
        started_at = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return cls(pid, started_at, fds.total(), number["Threads"], *memory, fds, _unrun_s(pid))


def _unrun_s(pid: int) -> float:
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


def fd_kinds(pid: int) -> Counter[str]:
    """How many descriptors of each kind: `socket`, `pipe`, `anon_inode`, a path."""
    kinds: Counter[str] = Counter()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            kinds[re.sub(r":\[\d+\]$", "", os.readlink(fd))] += 1
    return kinds


def leaks(name: str, before: Vitals, after: Vitals, warm: Vitals | None = None) -> list[str]:
    """What `after` holds too much of; empty when nothing leaked. Memory is judged since `warm`, where there is one."""
    found = []
    if after.num_fds > before.num_fds + MAX_MORE_FDS:
        found.append(f"{name}: {before.num_fds} descriptors before, {after.num_fds} after: {after.fds - before.fds}")
    if after.num_threads > before.num_threads + MAX_MORE_THREADS:
        found.append(f"{name}: {before.num_threads} threads before, {after.num_threads} after")
    since, most = (before, MAX_MORE_NBYTES) if warm is None else (warm, MAX_MORE_WARM_NBYTES)
    if after.nbytes > since.nbytes + most:
        found.append(f"{name}: {since.nbytes >> 20} MiB before, {after.nbytes >> 20} MiB after")
    return found
