"""Which class serves which data plane: the names of `--planes`, in the operator's order of preference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from disagg.transceiver.planes.base import LandingPlane, SourcePlane
from disagg.transceiver.planes.shm.plane import ShmLandingPlane, ShmSourcePlane
from disagg.transceiver.planes.tcp.landing import TcpLandingPlane
from disagg.transceiver.planes.tcp.source import TcpSourcePlane
from disagg.transceiver.planes.ucx.landing import UcxLandingPlane
from disagg.transceiver.planes.ucx.library import check_installed
from disagg.transceiver.planes.ucx.source import UcxSourcePlane
from disagg.transceiver.planes.zmq.landing import ZmqLandingPlane
from disagg.transceiver.planes.zmq.source import ZmqSourcePlane
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.sockets import Sockets


def source_planes(
    names: Sequence[str], *, host: str, advertised_host: str, keys: ClusterKeys, sockets: Sockets | None = None
) -> dict[str, SourcePlane]:
    """The sender's end of each plane, not yet listening. `sockets`: of this process, for planes that use ZeroMQ.

    Raises `EndpointRefused` where a package is missing.
    """
    _check_packages(names)
    make: dict[str, Callable[[], SourcePlane]] = {
        "shm": ShmSourcePlane,
        "tcp": lambda: TcpSourcePlane(host, keys, advertised_host=advertised_host),
        "ucx": lambda: UcxSourcePlane(host, keys, advertised_host=advertised_host),
        "zmq": lambda: ZmqSourcePlane(host, keys, advertised_host=advertised_host, sockets=sockets),
    }
    return {name: make[name]() for name in names}


def landing_planes(
    names: Sequence[str], *, keys: ClusterKeys, sockets: Sockets | None = None
) -> dict[str, Callable[[], LandingPlane]]:
    """How to make the receiver's end of each plane: one per peer and connection. As above."""
    _check_packages(names)
    make: dict[str, Callable[[], LandingPlane]] = {
        "shm": ShmLandingPlane,
        "tcp": TcpLandingPlane,
        "ucx": UcxLandingPlane,
        "zmq": lambda: ZmqLandingPlane(keys, sockets),
    }
    return {name: make[name] for name in names}


def _check_packages(names: Sequence[str]) -> None:
    """A plane that was asked for by name is not left out in silence."""
    if "ucx" in names:
        check_installed()
