"""Machines on one machine: network namespaces joined by veth pairs, whose links a test takes down.

A namespace lives as long as the process that holds it: nothing is named, nothing is left behind. `inside` moves the
calling thread, and what it starts, into one; sockets that exist stay where they were made.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Final

CLONE_NEWNET: Final = 0x40000000  # <linux/sched.h>


class Namespace:
    """One network stack; its loopback is up."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self._own = os.readlink("/proc/self/ns/net")
        deadline = time.monotonic() + 5
        while self._name() in (self._own, ""):
            assert self._holder.poll() is None, "unshare ended"
            assert time.monotonic() < deadline, "unshare made no namespace"
            time.sleep(0.005)
        self.ip("link", "set", "lo", "up")

    @property
    def pid(self) -> int:
        return self._holder.pid

    def _name(self) -> str:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{self.pid}/ns/net")
        return ""

    def ip(self, *words: str) -> None:
        with self.inside():
            subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def join(self, other: Namespace, device: str, mine: str, theirs: str) -> None:
        """A cable between two machines, called `device` at both ends; addresses with their prefix length."""
        self.ip("link", "add", device, "type", "veth", "peer", "name", device, "netns", str(other.pid))
        for end, address in ((self, mine), (other, theirs)):
            end.ip("addr", "add", address, "dev", device)
            end.ip("link", "set", device, "up")

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        with open("/proc/thread-self/ns/net") as before, open(f"/proc/{self.pid}/ns/net") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def missing() -> str | None:
    """Why namespaces cannot be made here."""
    for tool in ("unshare", "ip"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed"
    if os.geteuid() != 0:
        return "making and joining network namespaces needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN)"
    command = ["unshare", "--net", "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"]
    tried = subprocess.run(command, capture_output=True, text=True)
    return f"`{' '.join(command)}`: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Namespace())) for _ in range(count)]
