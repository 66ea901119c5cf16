"""One serving process, started alone or by a supervisor: logs, secret, announcements, exit code."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Final

from disagg.cli.announce import Announce, announcer
from disagg.cli.lifeline import secret_from_supervisor
from disagg.cli.logs import set_up_logs
from disagg.config.errors import ConfigError
from disagg.config.secret import read_secret
from disagg.config.settings import Role, RouterSettings, SecretSettings, WorkerSettings

USER_ERROR: Final = 2
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells report it

log = logging.getLogger(__name__)


def run_router(settings: RouterSettings, *, announce_fd: int | None = None, secret_fd: int | None = None) -> int:
    """`disagg router`."""
    set_up_logs(settings.log_level, role="router")

    def serve(secret: bytes, announce: Announce) -> int:
        require_free_port(settings.host, settings.port, "--port")
        require_free_port("127.0.0.1", settings.admin_port, "--admin-port")
        require_free_port(settings.control_host, settings.control_port, "--control-port")
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
        announce({"event": "progress", "stage": "importing torch"})
        from disagg.worker.main import run  # here, so that `--help` need not load torch

        return run(settings, role, secret, announce)

    return _serve(settings, serve, announce_fd, secret_fd)


def require_free_port(host: str, port: int, flag: str) -> None:
    """Raise ConfigError when `port` is taken or `host` is not ours; 0 is always free."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT is not busy
            probe.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on `{host}` is busy: choose another with `{flag}`, 0 takes a free one"
            ) from None
        reason = (exc.strerror or str(exc)).lower()
        raise ConfigError(f"cannot listen on `{host}` port {port} (`{flag}`): {reason}") from None


def _serve(
    settings: SecretSettings, serve: Callable[[bytes, Announce], int], announce_fd: int | None, secret_fd: int | None
) -> int:
    """Exit code of the process. A user's mistake is announced, or printed when nobody listens."""
    announce = announcer(announce_fd)
    try:
        return serve(_secret(settings, secret_fd), announce)
    except ConfigError as exc:
        announce({"event": "error", "message": str(exc)})
        if announce_fd is None:
            print(f"disagg: {exc}", file=sys.stderr)  # noqa: T201
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        log.critical("the process ends by an error of its own", exc_info=True)
        return 1


def _secret(settings: SecretSettings, secret_fd: int | None) -> bytes:
    if secret_fd is not None:
        return secret_from_supervisor(secret_fd)
    return read_secret(secret_file=settings.secret_file, insecure=settings.insecure, environ=os.environ)
