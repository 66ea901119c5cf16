"""Contenders by name, what each needs installed, and the environment its processes start with."""

from __future__ import annotations

import importlib.util
from typing import Final

from disagg.bench.chunked import PREFIX, make_chunked_side
from disagg.bench.peers import Memcpy, Mooncake, Nixl
from disagg.bench.side import ContenderSide
from disagg.bench.workers import WorkerDestination, WorkerSource

OURS: Final = ("shm", "tcp", "ucx", "zmq")
PEERS: Final[dict[str, type[Memcpy] | type[Nixl] | type[Mooncake]]] = {
    "memcpy": Memcpy,
    "memcpy-slots": Memcpy,
    "nixl": Nixl,
    "nixl-slots": Nixl,
    "nixl-tcp": Nixl,
    "mooncake": Mooncake,
}
ALL: Final = ("memcpy", "memcpy-slots", *OURS, "nixl", "nixl-slots", "nixl-tcp", "mooncake")

_PACKAGES: Final = {
    "ucx": "ucxx",
    "nixl": "nixl_cu12",
    "nixl-slots": "nixl_cu12",
    "nixl-tcp": "nixl_cu12",
    "mooncake": "mooncake",
}
ENVIRONMENT: Final = {
    "nixl-tcp": {"UCX_TLS": "tcp"},
    "mooncake": {"MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2"},
}


def missing_package(plane: str) -> str | None:
    """The package that `plane` needs and this Python does not have."""
    package = _PACKAGES.get(plane)
    return package if package is not None and importlib.util.find_spec(package) is None else None


def make_side(plane: str, is_source: bool, digests: bool) -> ContenderSide:
    """`plane`: a name of `ALL`, or one that `chunked.name_of` made."""
    if plane.startswith(PREFIX):
        return make_chunked_side(plane, is_source)
    if plane in PEERS:
        return PEERS[plane](is_source, plane)
    return WorkerSource(plane, digests=digests) if is_source else WorkerDestination(plane, digests=digests)
