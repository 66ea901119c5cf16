"""A router, a prefill and a decode worker as three processes that may open few files, and every door they listen at."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.abuse.vitals import Vitals
from support.cluster.system import START_TIMEOUT_S, System
from support.cluster.three_processes import SECRET, SERVES, Part, Trio, running_trio

from disagg.transceiver.wire.keys import ClusterKeys

KEYS = ClusterKeys.from_secret(SECRET.encode())
NUM_FILES = 1024  # the soft limit of a shell, a service and a container; here nothing can raise it
MAX_MODEL_LEN = 1024
PROGRAM = (str(Path(__file__).with_name("limited.py")), str(NUM_FILES))
WORKER_FLAGS = ("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--drain-timeout-s", "1")
WITHOUT_CHECKS = {"DISAGG_CHECK": "0"}  # looking through the whole cache after each step makes tokens late by itself
LISTENING = "0A"  # /proc/net/tcp's word for it
UNIX_LISTENING = 0x10000  # SO_ACCEPTCON in the flags of /proc/net/unix


@dataclass(frozen=True)
class Door:
    """Where a process accepts connections: a loopback port, or the name of a unix socket."""

    owner: str
    family: socket.AddressFamily
    address: tuple[str, int] | str

    def connect(self, timeout_s: float = 5.0) -> socket.socket:
        made = socket.socket(self.family)
        made.settimeout(timeout_s)
        try:
            made.connect(self.address)
        except BaseException:
            made.close()
            raise
        return made


@dataclass
class Pair:
    trio: Trio
    parts: dict[str, Part]

    @property
    def api(self) -> System:
        return self.trio.api

    @property
    def control(self) -> str:
        return self.trio.control

    def vitals(self) -> dict[str, Vitals]:
        """Of each process. Raises FileNotFoundError when one is gone."""
        return {name: Vitals.of(part.process.pid) for name, part in self.parts.items()}

    def ended(self) -> list[str]:
        """The processes that are gone, each with its last lines."""
        return [
            f"{name} ended with {part.process.returncode}: {''.join(part.log[-12:])}"
            for name, part in self.parts.items()
            if part.process.poll() is not None
        ]

    def is_linked(self) -> bool:
        workers = self.api.workers()
        links = [link["state"] for worker in workers if worker["role"] == "decode" for link in worker["links"]]
        return {worker["id"] for worker in workers} == {"prefill-0", "decode-0"} and links == ["ready"]

    def wait_until_linked(self, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.is_linked():
            assert not self.ended(), self.ended()
            assert time.monotonic() < deadline, "".join(part.text[-4000:] for part in self.parts.values())
            time.sleep(0.1)

    def doors(self) -> list[Door]:
        """Every listening socket of every process, as the kernel knows them: none can be forgotten."""
        return [door for name, part in self.parts.items() for door in doors_of(name, part.process.pid)]

    def door_of_http(self) -> Door:
        return next(door for door in self.doors() if door.address == _address_of(self.api.url))

    def door_of_admin(self) -> Door:
        return next(door for door in self.doors() if door.address == _address_of(self.api.admin))


def _address_of(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


def doors_of(owner: str, pid: int) -> list[Door]:
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            inodes |= set(re.findall(r"^socket:\[(\d+)\]$", str(fd.readlink())))
    return [*_tcp_doors(owner, inodes), *_unix_doors(owner, inodes)]


def _tcp_doors(owner: str, inodes: set[str]) -> Iterator[Door]:
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        if state != LISTENING or rest[5] not in inodes:
            continue
        host, port = local.split(":")
        address = socket.inet_ntoa(bytes.fromhex(host)[::-1])
        # What listens on every address is spoken to on loopback, like the rest.
        yield Door(owner, socket.AF_INET, ("127.0.0.1" if address == "0.0.0.0" else address, int(port, 16)))


def _unix_doors(owner: str, inodes: set[str]) -> Iterator[Door]:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[6] in inodes and int(words[3], 16) & UNIX_LISTENING:
            yield Door(owner, socket.AF_UNIX, words[7].replace("@", "\0", 1) if words[7][0] == "@" else words[7])


@contextlib.contextmanager
def running_pair(planes: str) -> Iterator[Pair]:
    """`demo` served by a pair that is linked."""
    with running_trio("demo", env=WITHOUT_CHECKS, program=PROGRAM) as trio:
        parts = {"router": trio.router}
        for role in ("prefill", "decode"):
            name = f"{role}-0"
            flags = (*WORKER_FLAGS, "--planes", planes)
            parts[name] = trio.start(role, name, *flags, env=WITHOUT_CHECKS, program=PROGRAM)
        for name in ("prefill-0", "decode-0"):
            parts[name].wait_for(SERVES)
        pair = Pair(trio, parts)
        pair.wait_until_linked()
        yield pair
