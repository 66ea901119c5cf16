"""What the supervisor shows while it works, on stderr: moving on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table


class Display(Protocol):
    """Synchronous and quick: called from the event loop."""

    def progress(self, name: str, stage: str) -> None:
        """The child `name` reached `stage`."""

    def ready(self, name: str) -> None:
        """The child `name` serves."""

    def say(self, sentence: str) -> None:
        """Something the user should know."""

    def log(self, line: str) -> None:
        """A log line of a child, as it is."""

    def settle(self) -> None:
        """Everything is ready: stop moving."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class PlainDisplay:
    """One line per fact, without control characters."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def progress(self, name: str, stage: str) -> None:
        self.log(f"{name}: {stage}")

    def ready(self, name: str) -> None:
        self.log(f"{name}: ready")

    def say(self, sentence: str) -> None:
        self.log(f"disagg: {sentence}")

    def log(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed cannot be told
            print(line, file=self._stream, flush=True)

    def settle(self) -> None:
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class LiveDisplay(PlainDisplay):
    """A table with one line per child, redrawn in place until all are ready; log lines scroll above it."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._console = Console(file=stream, highlight=False, emoji=False)
        self._rows: dict[str, Spinner | str] = {}
        self._live: Live | None = Live(console=self._console, transient=True, refresh_per_second=8)

    def progress(self, name: str, stage: str) -> None:
        self._set(name, Spinner("dots", stage), stage)

    def ready(self, name: str) -> None:
        self._set(name, "ready", "ready")

    def _set(self, name: str, row: Spinner | str, plain: str) -> None:
        if self._live is None:
            self.log(f"{name}: {plain}")
            return
        self._rows[name] = row
        table = Table.grid(padding=(0, 2))
        for child, shown in self._rows.items():
            table.add_row(child, shown)
        self._live.update(table, refresh=True)

    def log(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(line, markup=False, soft_wrap=True)

    def settle(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.settle()


def display() -> Display:
    """The display for this process's stderr."""
    return LiveDisplay(sys.stderr) if sys.stderr.isatty() else PlainDisplay(sys.stderr)
