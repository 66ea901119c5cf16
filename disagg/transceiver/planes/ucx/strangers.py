"""UCX's own tcp ports, closed to everybody once the pair is connected.

UCX listens for itself, and its tcp transport writes wherever in this process's memory a frame says, before anything of
UCX's protocol has named the sender, with neither key nor bounds and whatever features a context has. No setting turns
that off. So each port is open only from the moment that its worker is made until its one peer has connected, some
milliseconds; from then on the kernel drops every packet to it. Connections that are made already are not touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Final

from disagg.transceiver.wire.errors import PeerLost

_SO_ATTACH_FILTER: Final = 26  # asm-generic/socket.h; Python does not name it
_RETURN: Final = 0x06  # BPF_RET | BPF_K: let so many bytes of the packet pass
_DROP: Final = struct.pack("HBBI", _RETURN, 0, 0, 0)

_making = threading.Lock()
"""Workers are made one at a time: what begins to listen meanwhile is theirs."""


class OwnPorts:
    """The listening sockets of one UCX worker."""

    def __init__(self) -> None:
        self._fds: frozenset[int] = frozenset()

    @contextlib.contextmanager
    def noted(self, address: Callable[[], bytes]) -> Iterator[None]:
        """What is opened inside by UCX. `address()`: the worker's, afterwards, which names its ports."""
        with _making:
            before = _listening()
            yield
            named = address()
            opened = {fd: port for fd, port in _listening().items() if before.get(fd) != port}
            self._fds = frozenset(fd for fd, port in opened.items() if port.to_bytes(2, "big") in named)

    def shut(self) -> None:
        """Let no other process connect. Raises `PeerLost` where the kernel cannot: then the plane is not used."""
        for fd in self._fds:
            with socket.socket(fileno=os.dup(fd)) as listener:
                drop_all(listener)


def drop_all(listener: socket.socket) -> None:
    program = ctypes.create_string_buffer(_DROP, len(_DROP))
    described = struct.pack("HxxxxxxQ", 1, ctypes.addressof(program))
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
    except OSError as exc:
        raise PeerLost(f"ucx: UCX's own port cannot be closed to strangers here: {exc.strerror}") from exc


def _listening() -> dict[int, int]:
    """Descriptors of this process that listen on tcp, with their ports."""
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            sock = socket.socket(fileno=fd)
            try:
                is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
                if is_tcp and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found[fd] = sock.getsockname()[1]
            finally:
                sock.detach()
    return found
