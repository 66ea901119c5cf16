"""A folder through which a test turns faults of `faulty_worker.py` on and off, and learns which have fired.

`now.json` maps the name of a fault to what it needs; each firing claims a file `NAME.N`, so `times` holds over all
processes of a run. No test dependencies: workers import this.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

WIDE = "wide"
STAGED = "staged"


class Faults:
    """Both sides: a test calls `set` and the counts, a worker the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._now = folder / "now.json"

    # --- the test -------------------------------------------------------------------------------------------

    def set(self, **faults: dict[str, Any]) -> None:
        """From now on exactly these, each with a fresh count."""
        self._replace(self._now, "{}")
        for old in self.folder.glob("*.fired"):
            old.unlink()
        self._replace(self._now, json.dumps(faults))

    def add(self, **faults: dict[str, Any]) -> None:
        """These too, beside those that are on; no count begins anew."""
        self._replace(self._now, json.dumps(json.loads(self._now.read_text()) | faults))

    def end(self, name: str) -> None:
        """This one is off; what others hold they go on holding."""
        left = json.loads(self._now.read_text())
        del left[name]
        self._replace(self._now, json.dumps(left))

    def num_fired(self, name: str) -> int:
        return len(list(self.folder.glob(f"{name}.*.fired")))

    def wait_until_fired(self, name: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.num_fired(name):
            assert time.monotonic() < deadline, f"`{name}` did not fire"
            time.sleep(0.005)

    def forget(self, prefix: str) -> None:
        """What workers said so far under names that start so."""
        for path in self.folder.glob(f"{prefix}*.told"):
            path.unlink()

    def told(self, prefix: str) -> list[str]:
        """What workers said under names that start so."""
        return [path.read_text() for path in self.folder.glob(f"{prefix}*.told")]

    # --- a worker -------------------------------------------------------------------------------------------

    @property
    def is_wide(self) -> bool:
        """Whether the run was started with surplus blocks: a file, since a layout is made once."""
        return (self.folder / WIDE).exists()

    @property
    def is_staged(self) -> bool:
        """Whether the run was started with pools that have a host side of their own, as on an accelerator."""
        return (self.folder / STAGED).exists()

    def byte_to_flip(self, name: str, group: int) -> int | None:
        """Offset of the byte to flip in a unit of `group` now, or None."""
        fault = self._fault(name)
        if fault is None or fault.get("group", group) != group or not self._claim(name, fault):
            return None
        return int(fault["byte"])

    def names_any(self, *names: str) -> bool:
        """Whether one of these is on, fired or not."""
        return any(self._fault(name) is not None for name in names)

    def words(self, name: str, key: str = "kinds") -> list[str]:
        """A list that this fault needs; empty while it is off."""
        return list((self._fault(name) or {}).get(key, ()))

    def now(self, name: str) -> dict[str, Any] | None:
        """What this fault needs, while it is on."""
        return self._fault(name)

    def fires(self, name: str) -> bool:
        fault = self._fault(name)
        return fault is not None and self._claim(name, fault)

    def pause(self, name: str) -> None:
        """Sleep `seconds`; without them until the fault is off."""
        fault = self._fault(name)
        if fault is None or not self._claim(name, fault):
            return
        time.sleep(fault.get("seconds", 0.0))
        while "seconds" not in fault and self._fault(name) is not None:
            time.sleep(0.01)

    def tell(self, name: str, text: str) -> None:
        self._replace(self.folder / f"{name}.told", text)

    def _fault(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, dict[str, Any]] = json.loads(self._now.read_text())
        except FileNotFoundError:
            return None
        return found.get(name)

    def _claim(self, name: str, fault: dict[str, Any]) -> bool:
        """Fire at most `times` times; without it always, counted once."""
        for number in range(fault.get("times", 1)):
            try:
                os.close(os.open(self.folder / f"{name}.{number}.fired", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            return True
        return "times" not in fault

    def _replace(self, path: Path, text: str) -> None:
        """At once: a reader sees the old text or the new one."""
        made = path.with_suffix(f".{os.getpid()}.tmp")
        made.write_text(text)
        made.replace(path)
