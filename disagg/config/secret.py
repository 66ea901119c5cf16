"""The cluster secret: always there, never on a command line."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from disagg.config.errors import ConfigError
from disagg.config.private_file import read_private_file

NUM_SECRET_BYTES: Final = 32
MIN_SECRET_BYTES: Final = 16  # 128 bits: below this the keys derived from it could be guessed
MAX_SECRET_NBYTES: Final = 4096  # a secret is short; a wrong path may be a device without end
VARIABLE: Final = "DISAGG_SECRET"

INSECURE_SECRET: Final = b"disagg: this secret is published"
"""What `--insecure` uses. It protects nothing; it only lets the same code run."""


def draw_secret() -> bytes:
    """A fresh secret for the processes of one run."""
    return secrets.token_bytes(NUM_SECRET_BYTES)


def read_secret(*, secret_file: Path | None, insecure: bool, environ: Mapping[str, str]) -> bytes:
    """The secret of a process started alone: file, then environment. Raises ConfigError when there is none."""
    if insecure:
        return INSECURE_SECRET
    if secret_file is not None:
        return _checked(read_secret_file(secret_file), f"`{secret_file}`")
    if value := environ.get(VARIABLE):
        return _checked(os.fsencode(value).strip(), f"`{VARIABLE}`")
    raise ConfigError(
        f"no cluster secret: give the same `--secret-file` (or `{VARIABLE}`) to every process, "
        "made with `head -c 32 /dev/urandom | base64`; on one machine `--insecure` also works"
    )


def read_secret_file(path: Path) -> bytes:
    """The file's bytes without surrounding white space. Raises ConfigError when others may read it."""
    return read_private_file(path, "--secret-file", MAX_SECRET_NBYTES).strip()


def read_secret_fd(fd: int) -> bytes:
    """The secret that `up` wrote to a pipe; the pipe is closed."""
    with os.fdopen(fd, "rb") as pipe:
        return _checked(pipe.read(), "`--secret-fd`")


def _checked(secret: bytes, origin: str) -> bytes:
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"{origin} holds {len(secret)} bytes: expected {MIN_SECRET_BYTES} or more")
    return secret
