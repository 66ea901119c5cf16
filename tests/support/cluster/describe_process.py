"""What a process can tell of itself, as JSON: compared between a process that python started and a fork of a warm one.

With an argument more than one, it starts itself with one less and tells what that one says, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


def described() -> dict[str, Any]:
    return {
        "argv": sys.argv,
        "path": sys.path,
        "name": __name__,
        "command": [word for word in Path("/proc/self/cmdline").read_bytes().split(b"\0") if word],
        "environ": dict(os.environ),
        "folder": os.getcwd(),
        "descriptors": sorted(os.listdir("/proc/self/fd"), key=int),
        "signals": {str(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "threads": len(os.listdir("/proc/self/task")),
        "active": threading.active_count(),
        "leads_session": os.getsid(0) == os.getpid(),
        "leads_group": os.getpgid(0) == os.getpid(),
        "streams": [(stream.encoding, stream.errors) for stream in (sys.stdout, sys.stderr)],
        "thread": threading.current_thread().name,
    }


if __name__ == "__main__":
    mine = [described()]
    if len(sys.argv) > 2:
        argv = [sys.executable, "-P", sys.argv[0], *sys.argv[2:]]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, env=dict(os.environ), process_group=0)
        mine += json.loads(child.communicate()[0])
        assert child.returncode == 7, child.returncode
    json.dump(mine, sys.stdout, default=repr)
    sys.exit(7)
