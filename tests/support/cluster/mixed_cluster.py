"""A router and workers that differ, each started alone as an operator would: equal model, unequal caches."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from support.cluster.system import STOP_TIMEOUT_S, System
from support.cluster.warm import WarmPopen

START_TIMEOUT_S = 180.0  # five processes, four of them import torch: seconds alone, more than a minute on busy cores
READY = re.compile(r"msg=ready url=(\S+) admin=(\S+) control=(\S+)")
PORTS = ("--port", "0", "--admin-port", "0", "--control-port", "0")
ENGINE = (
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-batched-tokens", "37", "--max-num-seqs", "8"),
    *("--kv-cache-memory", "8MiB", "--threads", "1"),
)


@contextlib.contextmanager
def mixed_cluster(model: Path, folder: Path, workers: Mapping[str, tuple[str, ...]]) -> Iterator[System]:
    """`workers`: name -> (role, its flags...). Every pair is linked, and idle ones take turns.

    SIGTERM must end all processes with 0.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    shared = ("--model", str(model))
    router = _start(folder / "router", "router", *shared, *PORTS, "--policy", "least-loaded")
    processes = [router]
    try:
        url, admin, control = _wait_for(folder / "router", READY, router, deadline).groups()
        for name, (role, *own) in workers.items():
            words = (role, *shared, "--router", control, "--worker-id", name, *own, *ENGINE)
            processes.append(_start(folder / name, *words))
        system = System(router, url=url, admin=admin)  # type: ignore[arg-type]  # its output goes to a file
        roles = Counter(role for role, *_ in workers.values())
        _wait_for_links(system, roles["prefill"] * roles["decode"], deadline)
        yield system
        for process in processes:
            process.terminate()
        assert [process.wait(timeout=3 * STOP_TIMEOUT_S) for process in processes] == [0] * len(processes)
    except BaseException:
        for name in ("router", *workers):
            print(f"--- {name}\n{(folder / name).read_text()[-3000:]}" if (folder / name).exists() else name)
        raise
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _start(log: Path, *words: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-P", "-m", "disagg", *words, "--insecure"]
    with log.open("wb") as out:
        return WarmPopen(argv, stdout=out, stderr=out, env={**os.environ, "DISAGG_CHECK": "1"})


def _wait_for(log: Path, pattern: re.Pattern[str], process: subprocess.Popen[bytes], deadline: float) -> re.Match[str]:
    while (found := pattern.search(log.read_text())) is None:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found


def _wait_for_links(system: System, count: int, deadline: float) -> None:
    def states() -> list[str]:
        return [link["state"] for worker in system.workers("decode") for link in worker["links"]]

    while Counter(states()) != {"ready": count}:
        assert time.monotonic() < deadline, system.workers()
        time.sleep(0.1)
