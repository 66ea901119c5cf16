"""stdout and stderr that never end a run: what cannot be encoded is shown as `?`, what cannot be written is dropped.

A server outlives its terminal, the `head` it was piped into and a disk that is full for a while.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = 0, 1, 2
WAIT_MS: Final = 1000  # for a reader behind a descriptor that another program made non-blocking; then the text is lost


class Descriptor(io.RawIOBase):
    """Writes to a file descriptor. `failure`: why something written was dropped, if it was."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return self._write(data)
        except OSError as exc:
            self.failure = exc
            return memoryview(data).nbytes

    def _write(self, data: ReadableBuffer) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            waiting = select.poll()
            waiting.register(self._fd, select.POLLOUT)
            waiting.poll(WAIT_MS)
            return os.write(self._fd, data)


def open_closed_descriptors() -> None:
    """Give 0, 1 and 2 to `/dev/null` where they were closed: else the next socket gets such a number, and with it
    all that libraries print."""
    for fd in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(fd)
        except OSError:
            with contextlib.suppress(OSError):  # a root without /dev: then nothing can be done
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def forgive_output() -> None:
    """Let `sys.stdout` and `sys.stderr` of this process write through a `Descriptor`."""
    sys.stdout = _forgiving(STDOUT, sys.stdout, "replace")
    sys.stderr = _forgiving(STDERR, sys.stderr, "backslashreplace")


def _forgiving(fd: int, stream: TextIO | None, errors: str) -> TextIO:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    encoding = stream.encoding if stream is not None else "utf-8"
    buffer = io.BufferedWriter(Descriptor(fd))
    return io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=True)


def lost_result() -> str:
    """Why a command's result did not arrive in full; empty when it did, or when its reader wanted no more."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    failure = raw.failure if isinstance(raw, Descriptor) else None
    if failure is None or failure.errno == errno.EPIPE:
        return ""
    return f"the result cannot be written: {(failure.strerror or str(failure)).lower()}"
