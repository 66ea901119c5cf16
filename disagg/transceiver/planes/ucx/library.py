"""UCX as `ucxx` brings it: whether it is here, how it is set up, and which lanes an endpoint runs over."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import Any, Final

from disagg.transceiver.wire.errors import EndpointRefused

MISSING: Final = (
    "data plane ucx needs the package ucxx, which this Python does not have: "
    "pip install 'disagg[ucx-cu12]' (or [ucx-cu13]), or leave ucx out of --planes"
)

SETTINGS: Final = {
    # On one host the receiver then reads the sender's staging itself, by process_vm_readv, although endpoints handle
    # errors. UCX leaves `cma` out of such endpoints by default, since it cannot take back a peer's leave to read: a
    # sender that gave its peer up may refill a buffer that the peer, which still lives, is reading. Nothing here
    # relies on that: what was read is decoded only if its digest, sealed before, is right.
    "CMA_MEMORY_INVALIDATE": "y",
    # The receiver reads; no process writes into another's memory. A receive that has completed, however it ended,
    # has no writer left, so its staging can be used again; a late one-sided write would need a fence for that.
    "RNDV_SCHEME": "get_zcopy",
    # The kernel tells a death over a socket at once. UCX's shared memory lanes only ask for signs of life, 20 s apart
    # (measured: a sender whose receiver was killed waits in vain), and leave segments behind.
    "TLS": "^sysv,posix",
}
"""What UCX would choose otherwise. An operator's `UCX_*` variable of the same name wins."""

LOOPBACK_SETTINGS: Final = {"NET_DEVICES": "lo"}
"""Where only this host may connect: UCX listens on all its devices."""


@cache
def library() -> ModuleType:
    """ucxx's core, imported (half a second) at first use. Raises `EndpointRefused`."""
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # ucxx sets one that CPU builds do not know
    try:
        _load_ucx()
        import ucxx._lib.libucxx as core
    except (ImportError, OSError) as exc:
        is_missing = isinstance(exc, ModuleNotFoundError) and exc.name == "ucxx"
        raise EndpointRefused(MISSING if is_missing else f"ucx: ucxx cannot be used here: {exc}") from exc
    return core  # type: ignore[no-any-return]


def check_installed() -> None:
    """Raise `EndpointRefused` where ucxx is missing, without importing it."""
    if not _is_installed("ucxx"):
        raise EndpointRefused(MISSING)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _load_ucx() -> None:
    """Load libucx before ucxx does: only then `RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY` counts."""
    if _is_installed("libucx"):
        import libucx

        libucx.load_library()


def settings(is_loopback: bool) -> dict[str, str]:
    """Configuration of a context."""
    chosen = {**SETTINGS, **(LOOPBACK_SETTINGS if is_loopback else {})}
    return {name: value for name, value in chosen.items() if f"UCX_{name}" not in os.environ}


def features(core: ModuleType) -> tuple[Any, ...]:
    """What a context can do: tagged messages, and sleeping until one comes.

    Never RMA or AMO: where a context has them, UCX's own tcp listener reads and writes this process's memory for every
    stranger, with neither key nor bounds.
    """
    return core.Feature.TAG, core.Feature.WAKEUP


class _Entry(ctypes.Structure):
    _fields_ = (("transport", ctypes.c_char_p), ("device", ctypes.c_char_p))


class _EndpointAttributes(ctypes.Structure):
    """ucp_ep_attr_t of ucp.h, UCX 1.13 and later."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_uint64 * 16),
        ("remote_sockaddr", ctypes.c_uint64 * 16),
        ("entries", ctypes.POINTER(_Entry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
        ("user_data", ctypes.c_void_p),
    )


_TRANSPORTS: Final = 1 << 3  # UCP_EP_ATTR_FIELD_TRANSPORTS
_MAX_ENTRIES: Final = 16


def lanes(endpoint: Any) -> str:
    """The transports an endpoint runs over, such as `tcp/lo+cma`; `` where UCX does not say.

    ucxx does not pass this on, so UCX itself is asked, on the handle that ucxx holds.
    """
    try:
        ucp = ctypes.CDLL("libucp.so.0", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        query = ucp.ucp_ep_query
    except (OSError, AttributeError):
        return ""
    query.argtypes = [ctypes.c_void_p, ctypes.POINTER(_EndpointAttributes)]
    query.restype = ctypes.c_int8
    entries = (_Entry * _MAX_ENTRIES)()
    attributes = _EndpointAttributes(
        field_mask=_TRANSPORTS, entries=entries, num_entries=_MAX_ENTRIES, entry_size=ctypes.sizeof(_Entry)
    )
    if query(endpoint.handle, ctypes.byref(attributes)) != 0:
        return ""
    found = [_lane(entry) for entry in entries[: attributes.num_entries] if entry.transport]
    return "+".join(dict.fromkeys(found))


def _lane(entry: _Entry) -> str:
    transport, device = entry.transport.decode(), (entry.device or b"").decode()
    return transport if device in ("", "memory") else f"{transport}/{device}"
