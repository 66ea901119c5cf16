"""From `disagg up` to ready, from SIGKILL of a worker to ready again, from SIGTERM to the end; each process's CPU time.

    python benchmarks/start.py --rounds 3 [-- options of `disagg up`]

Prints one table of medians. Wall times are meaningful on an otherwise idle machine alone; its load is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TICKS = os.sysconf("SC_CLK_TCK")
POLL_S = 0.02
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Round:
    """One life of a cluster, in seconds; `cpu` by process until ready."""

    ready: float
    back: float
    stopped: float
    cpu: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("options", nargs="*", help="options of `disagg up`, after `--`")
    given = parser.parse_args()
    rounds = [measure(given.options) for _ in range(given.rounds)]
    print("| | median s | all |\n|---|---|---|")
    for name in ("ready", "back", "stopped"):
        _row(name, [getattr(one, name) for one in rounds])
    for process in rounds[0].cpu:
        _row(f"CPU of {process}", [one.cpu.get(process, 0.0) for one in rounds])
    _row("CPU of all", [sum(one.cpu.values()) for one in rounds])
    print(f"\nload {os.getloadavg()[0]:.1f}, {os.cpu_count()} CPUs")


def _row(name: str, values: list[float]) -> None:
    print(f"| {name} | {statistics.median(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} |")


def measure(options: list[str]) -> Round:
    """Start, kill the first worker, wait for it, stop."""
    began = time.monotonic()
    up = subprocess.Popen(  # noqa: S603 (this project's own command)
        [sys.executable, "-P", "-m", "disagg", "up", "--port", "0", "--admin-port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert up.stdout is not None
        url = next((line.split()[1] for line in up.stdout if line.startswith("curl ")), "").rpartition("/v1/")[0]
        ready = time.monotonic() - began
        if not url:
            raise SystemExit(f"`disagg up` ended with code {up.wait()} before it was ready")
        cpu = {name: _cpu_s(pid) for pid, name in family(up.pid)}
        back = _back_after_kill(url)
        began = time.monotonic()
        up.send_signal(signal.SIGTERM)
        up.wait(TIMEOUT_S)
        return Round(ready, back, time.monotonic() - began, cpu)
    finally:
        if up.poll() is None:
            up.kill()


def _back_after_kill(url: str) -> float:
    """Seconds until a worker that was killed serves under a new process."""
    victim = _workers(url)[0]
    began = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    while time.monotonic() - began < TIMEOUT_S:
        for worker in _workers(url):
            if worker["id"] == victim["id"] and worker["pid"] != victim["pid"]:
                return time.monotonic() - began
        time.sleep(POLL_S)
    raise SystemExit(f"`{victim['id']}` was not back after {TIMEOUT_S:g} s")


def _workers(url: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{url}/workers") as answer:  # noqa: S310 (the address that `up` printed)
        return list(json.load(answer)["workers"])


def family(pid: int) -> Iterator[tuple[int, str]]:
    """This process and all below it, each with a short name."""
    words = _read(pid, "cmdline").split("\0")
    told = words[words.index("-m") + 1 :] if "-m" in words else words[:1]
    name = told[0] if told[0] != "disagg" else told[1]
    yield pid, words[words.index("--worker-id") + 1] if "--worker-id" in words else name
    for child in _read(pid, f"task/{pid}/children").split():
        yield from family(int(child))


def _cpu_s(pid: int) -> float:
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _read(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/{name}", encoding="utf-8") as file:
        return file.read()


if __name__ == "__main__":
    main()
