"""`disagg drain WORKER`: have a router empty one worker, and wait until it is."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from typing import Any, Final
from urllib.parse import quote

from disagg.config.errors import ConfigError

ADMIN: Final = "http://127.0.0.1:8001"
"""Where `disagg router` serves administration unless it is told otherwise."""

LOOK_S: Final = 0.2
"""How often the worker's requests are counted: a move takes less, and a look costs the router a millisecond."""

TIMEOUT_S: Final = 10.0
"""Of one question to the router, which answers at once."""


def drain(worker: str, admin: str, *, wait: bool, undo: bool) -> int:
    """The exit code: 0 when it was done; 1 when the worker left before it was empty.

    Raises ConfigError for an address that does not answer, or a worker that is not registered.
    """
    answer = _ask(admin, f"/workers/{quote(worker, safe='')}/drain", "DELETE" if undo else "POST")
    if "error" in answer:
        raise ConfigError(f"{answer['error']['message']}: {_known(admin)}")
    if undo:
        _say(f"`{worker}` is given requests again")
        return 0
    return _wait_until_empty(worker, admin) if wait else 0


def _wait_until_empty(worker: str, admin: str) -> int:
    told = -1
    while True:
        here = [known for known in _workers(admin) if known["id"] == worker]
        if not here:
            _say(f"`{worker}` is registered no more")
            return 0 if told <= 0 else 1
        if (left := here[0]["requests"]) == 0:
            _say(f"`{worker}` is empty")
            return 0
        if left != told:
            _say(f"`{worker}` has {left} requests")
            told = left
        time.sleep(LOOK_S)


def _known(admin: str) -> str:
    names = ", ".join(sorted(known["id"] for known in _workers(admin)))
    return f"registered are {names}" if names else "none is"


def _workers(admin: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _ask(admin, "/workers", "GET")["workers"]
    return found


def _ask(admin: str, path: str, method: str) -> dict[str, Any]:
    """JSON of the admin listener, errors that it has words for included."""
    url = f"{admin.rstrip('/')}{path}"
    try:
        request = urllib.request.Request(url, method=method)  # noqa: S310 (an operator's own word)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as refusal:
        answer = json.load(refusal)
    except (OSError, ValueError) as fault:
        raise ConfigError(
            f"no router's admin listener answers at `{admin}` ({fault}): give `--admin` the address that it says "
            "when it starts"
        ) from fault
    return answer


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
