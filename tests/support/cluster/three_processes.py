"""Router and workers started one by one, as on several machines: `disagg router`, `disagg prefill`, `disagg decode`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.cluster.system import START_TIMEOUT_S, STOP_TIMEOUT_S, System
from support.cluster.warm import WarmPopen

SECRET = "one secret for every process of this cluster"
LISTENS = re.compile(r"msg=ready url=(?P<url>\S+) admin=(?P<admin>\S+) control=(?P<control>\S+)")
SERVES = re.compile(r"msg=ready worker_id=")


@dataclass
class Part:
    """One `disagg` process and what it wrote."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    _reader: threading.Thread | None = None

    @classmethod
    def start(cls, *argv: str, env: dict[str, str] | None = None, program: Sequence[str] = ("-m", "disagg")) -> Part:
        process = WarmPopen(
            [sys.executable, "-P", *program, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "DISAGG_CHECK": "1", "DISAGG_SECRET": SECRET, **(env or {})},
        )
        part = cls(process)
        part._reader = threading.Thread(target=part._read, daemon=True)
        part._reader.start()
        return part

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            self.log.extend(iter(stream.readline, ""))

    @property
    def text(self) -> str:
        return "".join(self.log)

    @property
    def sentences(self) -> list[str]:
        """What it said to the person who started it: lines that are no log lines."""
        return [line.removeprefix("disagg: ").strip() for line in self.log if line.startswith("disagg: ")]

    def wait_for(self, pattern: re.Pattern[str], timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """Until a line matches; fails at once when the process ends."""
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None
            for line in list(self.log):
                if match := pattern.search(line):
                    return match
            assert not ended, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < deadline, f"no line matches {pattern.pattern}:\n{self.text}"
            time.sleep(0.05)

    def wait_for_end(self, timeout_s: float = START_TIMEOUT_S) -> int:
        """The exit code, once everything it wrote was read."""
        code = self.process.wait(timeout_s)
        assert self._reader is not None
        self._reader.join(STOP_TIMEOUT_S)
        return code

    def stop(self) -> None:
        """SIGTERM; it must end by itself: with exit code 0, unless it was not yet serving and just dies of it."""
        self.process.send_signal(signal.SIGTERM)
        code = self.wait_for_end(STOP_TIMEOUT_S)
        assert code == 0 or (code == -signal.SIGTERM and "msg=ready" not in self.text), f"{code}:\n{self.text}"

    def kill(self) -> None:
        self.process.kill()
        self.wait_for_end()


class Trio:
    """A router by hand and the workers that a test adds to it."""

    def __init__(self, router: Part, model: Path | str) -> None:
        self.router = router
        self.model = model
        self.parts = [router]
        listens = router.wait_for(LISTENS)
        self.control = listens["control"]
        self.api = System(router.process, url=listens["url"].rstrip("/"), admin=listens["admin"].rstrip("/"))

    def start(
        self,
        role: str,
        name: str,
        *flags: str,
        env: dict[str, str] | None = None,
        program: Sequence[str] = ("-m", "disagg"),
    ) -> Part:
        """A worker that is starting. `flags` come last, and the last of a flag counts."""
        own = ("--router", self.control, "--worker-id", name, "--model", str(self.model), "--threads", "1")
        part = Part.start(role, *own, *flags, env=env, program=program)
        self.parts.append(part)
        return part


@contextlib.contextmanager
def running_trio(
    model: Path | str,
    *router_flags: str,
    env: dict[str, str] | None = None,
    program: Sequence[str] = ("-m", "disagg"),
) -> Iterator[Trio]:
    """A router alone. What still runs at the end is stopped, workers first."""
    ports = ("--port", "0", "--admin-port", "0", "--control-port", "0")
    router = Part.start("router", "--model", str(model), *ports, *router_flags, env=env, program=program)
    trio = None
    try:
        trio = Trio(router, model)
        yield trio
        for part in reversed(trio.parts):
            if part.process.poll() is None:
                part.stop()
    finally:
        for part in trio.parts if trio else [router]:
            if part.process.poll() is None:
                part.kill()
