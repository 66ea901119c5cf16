"""Starts a router and looks at its processes: none has loaded torch, and each stays small.

The import contracts say so of the source; what a process really maps also depends on what its libraries import.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MAX_RSS_MIB = 90
"""A router with torch takes 256 MiB, one without some 75."""
START_S = 60
"""For the slowest machine that runs the checks beside something else; a start takes about a second."""
COMMAND = ("router", "--insecure", "--port", "0", "--admin-port", "0", "--control-port", "0")


def family(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from family(int(child))


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def complaints(pid: int, command: str) -> Iterator[str]:
    if has_torch(pid):
        yield f"{command} ({pid}) has loaded torch, which it must not need"
    if rss_mib(pid) > MAX_RSS_MIB:
        yield f"{command} ({pid}) holds {rss_mib(pid):.0f} MiB, at most {MAX_RSS_MIB}"


def wait_until_serving(process: subprocess.Popen[bytes]) -> None:
    """Read its log until it names its URL; the rest of the log stays unread in the pipe, which is enough for it."""
    assert process.stderr is not None
    log, end = b"", time.monotonic() + START_S
    while b"url=" not in log:
        ready, _, _ = select.select([process.stderr], [], [], max(0.0, end - time.monotonic()))
        chunk = os.read(process.stderr.fileno(), 65536) if ready else b""
        if not chunk:
            raise SystemExit(f"error: the router did not start: {log.decode(errors='replace')[-2000:]}")
        log += chunk


def main() -> int:
    argv = [sys.executable, "-P", "-m", "disagg", *COMMAND]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            wait_until_serving(process)
            found: list[str] = []
            for pid in family(process.pid):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[-60:].strip()
                print(f"{command}: {rss_mib(pid):.0f} MiB, {cpu_s(pid):.2f} s of CPU")
                found += complaints(pid, command)
        finally:
            process.terminate()
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
