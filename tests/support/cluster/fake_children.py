"""Children for supervisor tests: the real pipes and lifeline of a `disagg` process, without router, worker or torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from disagg.cli.child import ChildSpec
from disagg.cli.display import PlainDisplay
from disagg.cli.supervisor import Ready

SECRET = b"0123456789abcdef0123456789abcdef"

PREAMBLE = """
import os, signal, sys, time
from disagg.cli.announce import announcer
from disagg.cli.lifeline import secret_from_supervisor
fds = dict(zip(sys.argv[-4::2], map(int, sys.argv[-3::2])))
announce, fd = announcer(fds["--announce-fd"]), fds["--secret-fd"]
secret = secret_from_supervisor(fd)
def ready(**facts):
    announce({"event": "ready", "pid": os.getpid(), **facts})
"""

SERVE = "ready(port=1, secret=secret.decode()); signal.pause()"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\nwhile True: signal.pause()"
LOGGING = "print('to stdout', flush=True); print('to stderr', file=sys.stderr, flush=True); ready(); signal.pause()"
REFUSING = "announce({'event': 'error', 'message': 'the model is too large'}); sys.exit(2)"
DYING = "os.kill(os.getpid(), signal.SIGKILL)"
READY_THEN_DYING = "ready(); os.kill(os.getpid(), signal.SIGKILL)"
SPEAKING_NONSENSE = "os.write(fds['--announce-fd'], b'{not json\\n[1]\\n{\"event\": 3}\\n'); ready(); signal.pause()"


def child(name: str, body: str, *args: str) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-P", "-c", PREAMBLE + body, *args), dict(os.environ))


@dataclass
class FakeCluster:
    """`router_body` and the worker bodies by name; remembers what the router was told at each start."""

    router_body: str = SERVE
    worker_bodies: Mapping[str, str] = field(default_factory=lambda: {"prefill-0": SERVE, "decode-0": SERVE})
    router_told: list[Ready | None] = field(default_factory=list)

    def router(self, ready: Ready | None) -> ChildSpec:
        self.router_told.append(ready)
        return child("router", self.router_body)

    def workers(self) -> Sequence[ChildSpec]:
        return [child(name, body) for name, body in self.worker_bodies.items()]


class Recording(PlainDisplay):
    """Remembers what was shown."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
