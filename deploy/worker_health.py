"""Exit code 0 when the router says that the worker DISAGG_WORKER_ID is ready: a worker has no HTTP of its own.

python worker_health.py http://router:8000
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Any

TIMEOUT_S = 3  # below the interval of any health check worth having


def is_ready(document: Any, worker_id: str) -> bool:
    """Whether the answer of `GET /workers` lists `worker_id` in state `ready`."""
    return any(worker["id"] == worker_id and worker["state"] == "ready" for worker in document["workers"])


def main(router: str, worker_id: str) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the router is near: no proxy
    try:
        with opener.open(f"{router}/workers", timeout=TIMEOUT_S) as answer:
            document = json.load(answer)
    except (OSError, ValueError) as exc:
        print(f"no answer from {router}/workers: {exc}")
        return 1
    return 0 if is_ready(document, worker_id) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], os.environ["DISAGG_WORKER_ID"]))
