"""Log lines: one structured line each on stderr, `key=value`, without colour: people and collectors read the same."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any, Final

_PLAIN: Final = re.compile(r"[^\s\"=\x00-\x1f\x7f]+")
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class LogfmtFormatter(logging.Formatter):
    """`ts=... level=info role=prefill msg="..." request_id=...`: what a caller passes as `extra` are further keys."""

    def __init__(self, **process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"ts": _timestamp(record.created), "level": record.levelname.lower(), **self.process}
        fields |= {"logger": record.name, "msg": record.getMessage()}
        fields |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            fields["exc"] = self.formatException(record.exc_info)
        return " ".join(f"{key}={quoted(value)}" for key, value in fields.items())


def quoted(value: object) -> str:
    """The value as one word, or as a JSON string when it has spaces, quotes or line breaks."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def set_up_logs(level: str, **process: str) -> None:
    """Send every log line and Python warning of this process to stderr. `process` is in each line, such as its role."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogfmtFormatter(**process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def _timestamp(seconds: float) -> str:
    """UTC with milliseconds: lines of several machines sort together."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
