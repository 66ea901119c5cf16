"""`disagg` processes as forks of one that has loaded torch: a system starts in a third of the time."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any, Final

from support.cluster.warm_parent import PIPES, PYTHON, REQUEST_NBYTES, as_named, can_stand_for, descriptors_of

PROGRAM: Final = Path(__file__).with_name("warm_parent.py")
LOAD_TIMEOUT_S: Final = 60.0  # seconds alone, many times that between busy neighbours
COMMAND_NBYTES: Final = 1 << 13  # of the longest command line of a test


class WarmParent:
    """The process that forks. It ends with this one."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REQUEST_NBYTES)
        self._control.settimeout(LOAD_TIMEOUT_S)
        self._lock = threading.Lock()
        argv = [*PYTHON, str(PROGRAM), str(theirs.fileno()), "-" * COMMAND_NBYTES]
        with theirs:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},  # a fork needs one thread
            )
        assert self._control.recv(16) == b"ready", "the warm parent ended"

    def fork(self, fds: dict[int, int], **asked: Any) -> tuple[int, int]:
        """The new process's id, and a descriptor on which its exit code comes."""
        told, theirs = os.pipe()
        request = json.dumps({"fds": list(fds), **asked})
        with self._lock:
            socket.send_fds(self._control, [request.encode()], [*fds.values(), theirs])
            pid = int(self._control.recv(16))
        os.close(theirs)
        return pid, told

    def end(self) -> None:
        """Without more requests it ends, and its forks with it."""
        self._control.close()
        self.process.wait(LOAD_TIMEOUT_S)

    def is_on_my_network(self) -> bool:
        """Whether its forks have the network namespace that the calling thread is in."""
        mine, its = (os.readlink(f"/proc/{task}/ns/net") for task in ("thread-self", self.process.pid))
        return mine == its


@functools.cache
def _parent() -> WarmParent:
    made = WarmParent()
    atexit.register(made.end)
    return made


STARTING: Final = threading.Lock()


def parent() -> WarmParent:
    """The warm parent of this process's tests, started when it is first needed, by whichever thread."""
    with STARTING:
        return _parent()


class WarmPopen(subprocess.Popen[Any]):
    """A `disagg` process; a fork where one can stand for it. Its end is told by its parent, which is not this one."""

    _told = -1

    def _execute_child(self, *values: Any) -> None:
        given = as_named(self, values)
        env = dict(os.environ if given["env"] is None else given["env"])
        if not (can_stand_for(given["args"], env) and parent().is_on_my_network()):
            super()._execute_child(*values)  # type: ignore[misc]
            return
        self.pid, self._told = parent().fork(
            descriptors_of(given),
            argv=list(given["args"][len(PYTHON) :]),
            env=env,
            cwd=str(given["cwd"] or os.getcwd()),
            session=given["start_new_session"],
        )
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in PIPES))  # type: ignore[attr-defined]

    def _internal_poll(self, *values: Any, **options: Any) -> int | None:
        if self._told == -1:
            return super()._internal_poll(*values, **options)  # type: ignore[misc, no-any-return]
        self._look(0.0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self._told == -1:
            return super()._wait(timeout)  # type: ignore[misc, no-any-return]
        self._look(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    def _look(self, timeout_s: float | None) -> None:
        """Wait so long for the exit code, which comes once."""
        with self._waitpid_lock:  # type: ignore[attr-defined]
            if self.returncode is None and _is_readable(self._told, timeout_s):
                told = os.read(self._told, 16)
                os.close(self._told)
                assert told, "the warm parent is gone"
                self.returncode = int(told)


def _is_readable(fd: int, timeout_s: float | None) -> bool:
    """Unlike `select`, for descriptors of any number."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))
