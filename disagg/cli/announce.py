"""What a child tells its supervisor: one JSON object per line on an inherited pipe.

- `{"event": "progress", "stage": "loading model"}` while it starts;
- `{"event": "ready", ...}` when it serves. Router: `url`, `admin`, `control`, `pid`. Worker: `worker_id`, `memory`
  (KV bytes), `threads`, `max_model_len`, `device`, `pid`, and where prefixes are kept `reuse` (the room for them, in
  words) and `reuse_advice` (a sentence, when there is none);
- `{"event": "error", "message": ...}` when what the user gave cannot be used; the child then exits with code 2.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from typing import Any

Announce = Callable[[dict[str, Any]], None]

log = logging.getLogger(__name__)


def announcer(fd: int | None) -> Announce:
    """Announce to a supervisor's pipe; a process started alone has none and logs instead."""
    return log_announcement if fd is None else PipeAnnouncer(fd)


class PipeAnnouncer:
    """Writes whole lines. A supervisor that is gone is not our error: the lifeline ends this process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, event: dict[str, Any]) -> None:
        try:
            os.write(self._fd, json.dumps(event).encode() + b"\n")
        except BrokenPipeError:
            log.warning("the supervisor is gone")


def log_announcement(event: dict[str, Any]) -> None:
    """Errors are left out: the command prints their sentence."""
    facts = {key: value for key, value in event.items() if key not in {"event", "pid"}}
    if event["event"] != "error":
        log.info(str(event["event"]), extra=facts)


def parse_announcement(line: bytes) -> dict[str, Any] | None:
    """The event in one line; None if the line is none."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
