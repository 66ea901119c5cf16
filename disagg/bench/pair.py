"""A contender's two processes, as the controller drives them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from disagg.bench.cases import Case
from disagg.bench.contenders import ENVIRONMENT

ANSWER_S: Final = 120.0
"""Starting Python and filling half a GiB takes seconds on a busy machine; a transfer milliseconds."""

LEAD_S: Final = 0.005
"""Both sides must have read the instant at which they start before it comes."""


class BenchError(Exception):
    """A side failed, or moved wrong bytes; the message carries its traceback."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition. `seconds`: from FETCH to ready to decode (peers: from the start to the notice).

    `exposed_s`: from the end of the prompt's computation to ready to decode; where nothing is computed, `seconds`.
    """

    seconds: float
    cpu_s: float
    operations: int
    digest_s: float
    exposed_s: float = 0.0


class _Process:
    def __init__(self, plane: str, role: str, digests: bool) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "disagg.bench.child", str(theirs.fileno()), plane, role]
        environment = {**os.environ, "UCX_WARN_UNUSED_ENV_VARS": "n", **ENVIRONMENT.get(plane, {})}
        self._process = subprocess.Popen(  # noqa: S603
            [*command, "on" if digests else "off"],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdout=2,  # the results are alone on ours
        )
        theirs.close()
        ours.settimeout(ANSWER_S)
        self._socket = ours
        self._lines = ours.makefile("rb")

    def ask(self, **request: Any) -> None:
        self._socket.sendall(json.dumps(request).encode() + b"\n")

    def answer(self) -> Any:
        line = self._lines.readline()
        if not line:
            raise BenchError(f"a process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise BenchError(answer["error"])
        return answer

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Pair:
    """Source and destination of one contender, for one case."""

    def __init__(self, plane: str, digests: bool, case: Case) -> None:
        self.plane, self.digests, self.case = plane, digests, case
        self._stack = contextlib.ExitStack()
        self._sides = [_Process(plane, role, digests) for role in ("source", "destination")]
        for side in self._sides:
            self._stack.callback(side.close)
        secret = secrets.token_bytes(32).hex()
        try:
            said = self._both([{"do": "open", "case": case.name, "secret": secret}] * 2)
            self._both([{"do": "connect", "other": other} for other in reversed(said)])
        except BaseException:
            self._stack.close()
            raise

    def repeat(self, number: int, rng: np.random.Generator) -> Sample:
        """Move once, over blocks drawn anew whose data is new too, and compare every byte. Raises `BenchError`."""
        blocks = [self.case.draw_blocks(rng).tolist() for _ in self._sides]
        both = [{"mine": mine, "theirs": theirs} for mine, theirs in (blocks, blocks[::-1])]
        prepared = self._both([{"do": "prepare", "number": number, **ids} for ids in both])
        at = time.monotonic() + LEAD_S
        moved = self._both([{"do": "move", "at": at}] * 2)
        sent, landed = self._both([{"do": "hash", **ids} for ids in both])
        if sent != landed:
            raise BenchError(f"{self.plane}: {sum(map(int.__ne__, sent, landed))} pieces differ after the transfer")
        return Sample(
            seconds=moved[1]["end"] - at,
            cpu_s=sum(side["cpu_s"] for side in moved),
            operations=moved[1]["operations"],
            digest_s=prepared[0]["digest_s"],
            exposed_s=moved[1]["end"] - moved[0]["computed"],
        )

    def close(self) -> None:
        """Ask both to close, then end them, whatever they say."""
        with contextlib.suppress(BenchError, OSError):
            self._both([{"do": "close"}] * 2)
        self._stack.close()

    def _both(self, requests: list[dict[str, Any]]) -> list[Any]:
        for side, request in zip(self._sides, requests, strict=True):
            side.ask(**request)
        return [side.answer() for side in self._sides]
