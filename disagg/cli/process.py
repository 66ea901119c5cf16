"""One serving process, started alone or by a supervisor: logs, secret, announcements, exit code."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Final

from disagg.cli.announce import Announce, announcer
from disagg.cli.lifeline import secret_from_supervisor
from disagg.cli.logs import set_up_logs
from disagg.cli.ports import LOOPBACK, Address, require_free_ports
from disagg.config.devices import check_devices
from disagg.config.errors import ConfigError, found_in, leaves
from disagg.config.secret import read_secret
from disagg.config.settings import Role, RouterSettings, SecretSettings, WorkerSettings

USER_ERROR: Final = 2
MAX_TOLD_CHARS: Final = 300  # of an error in one sentence; libraries write pages, and the log has them
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it

log = logging.getLogger(__name__)


def run_router(settings: RouterSettings, *, announce_fd: int | None = None, secret_fd: int | None = None) -> int:
    """`disagg router`."""
    set_up_logs(settings.log_level, role="router")

    def serve(secret: bytes, announce: Announce) -> int:
        require_free_ports(
            Address("--port", settings.host, settings.port),
            Address("--admin-port", LOOPBACK, settings.admin_port),
            Address("--control-port", settings.control_host, settings.control_port),
        )
        with _without_collections():
            from disagg.api.main import run  # here, so that `--help` need not load the serving stack

        return run(settings, secret, announce)

    return _serve(settings, serve, announce_fd, secret_fd)


def run_worker(
    role: Role, settings: WorkerSettings, *, announce_fd: int | None = None, secret_fd: int | None = None
) -> int:
    """`disagg prefill`, `disagg decode`, `disagg both`."""
    settings = settings.model_copy(update={"worker_id": settings.name(role)})
    set_up_logs(settings.log_level, role=role, worker=settings.name(role))

    def serve(secret: bytes, announce: Announce) -> int:
        check_devices((settings.device,), "--device")
        announce({"event": "progress", "stage": "importing torch"})
        with _without_collections():
            from disagg.worker.main import run  # here, so that `--help` need not load torch

        return run(settings, role, secret, announce)

    return _serve(settings, serve, announce_fd, secret_fd)


def _serve(
    settings: SecretSettings, serve: Callable[[bytes, Announce], int], announce_fd: int | None, secret_fd: int | None
) -> int:
    """Exit code of the process. A user's mistake is announced, or printed where no parent listens."""
    announce = announcer(announce_fd)
    try:
        return serve(_secret(settings, secret_fd), announce)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as exc:
        if (mistake := found_in(exc, ConfigError)) is not None:
            announce({"event": "error", "message": str(mistake)})
            if announce_fd is None:
                print(f"disagg: {' '.join(str(mistake).split())}", file=sys.stderr)  # noqa: T201
            return USER_ERROR
        log.critical("the process ends by an error of its own", exc_info=True)
        announce({"event": "error", "message": _in_a_line(exc)})
        return 1


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Modules stay: looking through them for garbage, while they are imported and ever after, took 0.5 s of a start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _in_a_line(exc: BaseException) -> str:
    """The error that the traceback in the log is about."""
    cause = next(leaves(exc))
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:MAX_TOLD_CHARS]}".rstrip(": ")


def _secret(settings: SecretSettings, secret_fd: int | None) -> bytes:
    if secret_fd is not None:
        return secret_from_supervisor(secret_fd)
    return read_secret(secret_file=settings.secret_file, insecure=settings.insecure, environ=os.environ)
