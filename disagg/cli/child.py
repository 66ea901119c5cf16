"""One child process: its pipes, its announcements, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from disagg.cli.announce import parse_announcement

LINE_NBYTES: Final = 1 << 20  # longest log line or announcement taken whole; tracebacks as one line reach tens of KiB
DRAIN_S: Final = 0.2  # for what a dead child left in its pipes: already in the kernel, so this only bounds a grandchild


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to start. `argv` gets `--announce-fd N --secret-fd N` appended; `env` is the whole environment."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)


class Child:
    """A running child. Its secret pipe stays open until `close`: its end tells the child that we are gone."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int, announcements: int, stderr: int) -> None:
        self.process = process
        self._lifeline = lifeline
        self._announcements = announcements
        self._stderr = stderr

    @classmethod
    async def spawn(cls, spec: ChildSpec, secret: bytes) -> Child:
        """Start the process in its own process group: a Ctrl-C in the terminal reaches the supervisor alone."""
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            secret_r, secret_w = _pipe(theirs, ours)
            announce_w, announce_r = reversed(_pipe(ours, theirs))
            stderr_w, stderr_r = reversed(_pipe(ours, theirs))
            os.write(secret_w, secret)  # far below the pipe's capacity: does not block
            process = await asyncio.create_subprocess_exec(
                *spec.argv, "--announce-fd", str(announce_w), "--secret-fd", str(secret_r),
                env=dict(spec.env), pass_fds=(announce_w, secret_r), process_group=0,
                stdin=subprocess.DEVNULL, stdout=stderr_w, stderr=stderr_w,
            )  # fmt: skip
            ours.pop_all()
        return cls(process, secret_w, announce_r, stderr_r)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def announcements(self) -> AsyncIterator[dict[str, Any]]:
        """The child's events until it closes the pipe. Consumed once."""
        async for line in _lines(self._announcements):
            if (event := parse_announcement(line)) is not None:
                yield event

    async def log_lines(self) -> AsyncIterator[str]:
        """What the child wrote to stdout and stderr. Consumed once."""
        async for line in _lines(self._stderr):
            yield line.decode(errors="replace").rstrip("\n")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def stop(self, grace_s: float) -> int:
        """SIGTERM, then SIGKILL after `grace_s`. Returns the exit code; the process is reaped."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            return await asyncio.wait_for(self.process.wait(), grace_s)
        except TimeoutError:
            self.kill()
            return await self.process.wait()

    def close(self) -> None:
        """Close the secret pipe. The other two are closed by their readers."""
        os.close(self._lifeline)


def describe_exit(code: int) -> str:
    """`exited with code 1` or `was killed by SIGKILL`."""
    if code >= 0:
        return f"exited with code {code}"
    names = {int(number): number.name for number in signal.Signals}  # real-time signals between the two named have none
    return f"was killed by {names.get(-code, f'signal {-code}')}"


def _pipe(reader: contextlib.ExitStack, writer: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose ends are closed with the stacks."""
    read_end, write_end = os.pipe()
    reader.callback(os.close, read_end)
    writer.callback(os.close, write_end)
    return read_end, write_end


async def _lines(fd: int) -> AsyncIterator[bytes]:
    """Lines of a pipe until its end; a longer one comes in parts. Owns `fd`."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_NBYTES)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb"))
    try:
        while line := await _line(reader):
            yield line
    finally:
        transport.close()


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as exc:
        return exc.partial
    except asyncio.LimitOverrunError as exc:
        return await reader.read(exc.consumed)
