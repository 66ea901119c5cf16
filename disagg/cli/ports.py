"""The ports that a command is told to listen at, tried before anything starts."""

from __future__ import annotations

import contextlib
import errno
import socket
from dataclasses import dataclass
from typing import Final

from disagg.config.errors import ConfigError

LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Address:
    """What one flag asks for; port 0 takes a free one."""

    flag: str
    host: str
    port: int


def require_free_ports(*addresses: Address) -> None:
    """Listen at all of them at once and let go. Raises ConfigError for one that is taken, not ours, or given twice."""
    with contextlib.ExitStack() as held:
        for place, address in enumerate(addresses):
            try:
                held.enter_context(_listening(address))
            except (OSError, UnicodeError) as exc:  # a host name may be none that can be written
                raise ConfigError(_refusal(address, addresses[:place], exc)) from None


def hold_port(host: str, port: int) -> socket.socket:
    """A socket bound to `port`, or with 0 to a free one, that never listens: a child that reuses addresses can.

    While it is open the kernel gives the port to nothing that asks for just any. Raises OSError.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
    except OSError:
        held.close()
        raise
    return held


def _listening(address: Address) -> socket.socket:
    """A socket that listens: bound alone, two that may reuse addresses would not notice each other."""
    family, kind, _, _, bound_to = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    probe = socket.socket(family, kind)
    try:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is not busy
        probe.bind(bound_to)
        probe.listen(1)
    except OSError:
        probe.close()
        raise
    return probe


def _refusal(address: Address, held: tuple[Address, ...], exc: OSError | UnicodeError) -> str:
    code = exc.errno if isinstance(exc, OSError) else None
    if code == errno.EADDRINUSE:
        for other in held:
            if other.port == address.port:
                return f"`{other.flag}` and `{address.flag}` are both {address.port}: give each a port of its own, or 0"
        return (
            f"port {address.port} on `{address.host}` is busy: choose another with `{address.flag}`, 0 takes a free one"
        )
    reason = (exc.strerror or str(exc)).lower() if isinstance(exc, OSError) else "not a host name"
    step = ": choose one from 1024 on" if code == errno.EACCES else ""
    return f"cannot listen on `{address.host}` port {address.port} (`{address.flag}`): {reason}{step}"
