"""The real system in real processes: `disagg up`, spoken to over HTTP only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from support.cluster.warm import WarmPopen
from support.faults.wrong import Wrong

START_TIMEOUT_S = 90.0  # three processes that import torch on two busy cores
STOP_TIMEOUT_S = 20.0
ON_ITS_WAY_S = 0.15  # a lease crosses loopback in a millisecond
SETTLE_TIMEOUT_S = 20.0  # forty leases
ON_CPU = {"DISAGG_PREFILL_DEVICES": "cpu", "DISAGG_DECODE_DEVICES": "cpu"}  # on machines with GPUs too
LEAKED_S = 30.0  # three times a lease, which is the last thing that could still end what is held

SERVING = re.compile(r"serving `(?P<name>.*)` at (?P<url>\S+) \(admin: (?P<admin>\S+)\)")


@dataclass
class System:
    """One running `disagg up`."""

    process: subprocess.Popen[str]
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    url: str = ""
    admin: str = ""
    _readers: list[threading.Thread] = field(default_factory=list)

    def read_output(self) -> None:
        for stream, lines in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr)):
            assert stream is not None
            reader = threading.Thread(target=_read_lines, args=(stream, lines), daemon=True)
            reader.start()
            self._readers.append(reader)

    def close(self) -> None:
        """After the process ended: join the readers, which close the pipes."""
        for reader in self._readers:
            reader.join(STOP_TIMEOUT_S)

    def get(self, path: str, *, admin: bool = False) -> Any:
        with urllib.request.urlopen((self.admin if admin else self.url) + path, timeout=10) as response:
            body = response.read()
        return json.loads(body) if response.headers["Content-Type"].startswith("application/json") else body.decode()

    def post(self, path: str, body: Any, *, timeout_s: float = 60, request_id: str = "") -> tuple[int, Any]:
        """(status, JSON) whatever the status."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"X-Request-Id": request_id} if request_id else {})
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def complete(self, prompt: list[int] | str, *, request_id: str = "", **body: Any) -> tuple[int, Any]:
        return self.post("/v1/completions", {"prompt": prompt, "return_token_ids": True} | body, request_id=request_id)

    def record(self, request_id: str) -> Any:
        return self.get(f"/requests/{request_id}", admin=True)

    def workers(self, role: str = "") -> list[dict[str, Any]]:
        return [worker for worker in self.get("/workers")["workers"] if not role or worker["role"] == role]

    def worker(self, name: str) -> dict[str, Any]:
        (found,) = [worker for worker in self.workers() if worker["id"] == name]
        return found

    def drain(self, name: str, *, undo: bool = False) -> None:
        """Empty a worker, or give it requests again."""
        url, method = f"{self.admin}/workers/{name}/drain", "DELETE" if undo else "POST"
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as response:
            assert json.load(response) == {"worker": name, "draining": not undo}

    def samples(self, name: str, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
        """Samples of one metric whose labels include `labels`, by all of their labels."""
        found = {}
        for line in self.get("/metrics").splitlines():
            match = re.fullmatch(re.escape(name) + r"(?:\{(.*)\})? (\S+)", line)
            if match:
                own = dict(re.findall(r'(\w+)="([^"]*)"', match[1] or ""))
                if labels.items() <= own.items():
                    found[frozenset(own.items())] = float(match[2])
        return found

    def total(self, name: str, **labels: str) -> float:
        return sum(self.samples(name, **labels).values())

    def pid_of(self, name: str) -> int:
        """Pid of the router or of a worker, read from the process table: the children of `up`."""
        for pid in children_of(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if name.encode() in words:
                return pid
        raise LookupError(f"no child {name}: {self.stderr[-20:]}")

    def settle(self) -> None:
        """Until every worker's lease, which carries its figures, was sent after this call: the next to come, but for
        one that was on its way."""
        time.sleep(ON_ITS_WAY_S)
        before, deadline = self._loop_ticks(), time.monotonic() + SETTLE_TIMEOUT_S
        assert before, "no worker tells its loop's ticks"
        while any(self._loop_ticks().get(worker) == ticks for worker, ticks in before.items()):
            assert time.monotonic() < deadline, "a worker sends no lease"
            time.sleep(0.02)

    def _loop_ticks(self) -> dict[frozenset[tuple[str, str]], float]:
        """Of every worker's event loop, as its last lease told them: no two leases tell the same."""
        return self.samples("disagg_worker_loop_lag_seconds_count")

    def wait_until_idle(self, timeout_s: float = 10.0) -> None:
        """Until every worker reports zero used blocks. Later than `timeout_s` is late, kept for good is `Wrong`."""
        began_at = time.monotonic()
        while used := {k: v for k, v in self.samples("disagg_kv_blocks_used").items() if v}:
            if time.monotonic() - began_at > LEAKED_S:
                raise Wrong(f"blocks still used: {used}")
            time.sleep(0.1)
        passed_s = time.monotonic() - began_at
        assert passed_s < timeout_s, f"blocks were used for {passed_s:.1f} s"

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                self.get("/ready")
                return
            assert time.monotonic() < deadline, "\n".join(self.stderr[-40:])
            time.sleep(0.1)


def _read_lines(stream: IO[str], lines: list[str]) -> None:
    with stream:
        lines.extend(iter(stream.readline, ""))


def children_of(pid: int) -> list[int]:
    """Direct children, from /proc."""
    with contextlib.suppress(FileNotFoundError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def start(*flags: str, env: dict[str, str] | None = None, program: Sequence[str] = ("-m", "disagg")) -> System:
    """`disagg up` with its output being read, not yet ready. `program`: what python runs as `disagg`."""
    argv = [sys.executable, "-P", *program, "up", "--port", "0", *flags]
    process = WarmPopen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DISAGG_CHECK": "1", **ON_CPU, **(env or {})},
        start_new_session=True,
    )
    system = System(process)
    system.read_output()
    return system


def wait_for_start(system: System) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not any("curl " in line for line in system.stdout):
        log = "".join(system.stderr[-60:])
        assert system.process.poll() is None, f"`disagg up` ended with {system.process.returncode}:\n{log}"
        assert time.monotonic() < deadline, f"`disagg up` is not ready:\n{log}"
        time.sleep(0.05)
    match = next(filter(None, map(SERVING.match, system.stdout)))
    system.url, system.admin = match["url"].rstrip("/"), match["admin"].rstrip("/")


def stop(system: System) -> None:
    """SIGTERM; every child must end with it."""
    children = children_of(system.process.pid)
    system.process.send_signal(signal.SIGTERM)
    code = system.process.wait(timeout=STOP_TIMEOUT_S)
    left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert not left, f"children outlived `disagg up`: {left}"
    assert code == 128 + signal.SIGTERM, f"exit code {code}:\n{''.join(system.stderr[-40:])}"


@contextlib.contextmanager
def running(
    *flags: str, env: dict[str, str] | None = None, program: Sequence[str] = ("-m", "disagg")
) -> Iterator[System]:
    """A system that is ready, and gone afterwards with all it started."""
    system = start(*flags, env=env, program=program)
    try:
        wait_for_start(system)
        yield system
        stop(system)
    finally:
        if system.process.poll() is None:
            os.killpg(system.process.pid, signal.SIGKILL)
            system.process.wait()
        system.close()
