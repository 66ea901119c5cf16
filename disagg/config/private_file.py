"""Files that only their owner may read: the cluster's secret, the API keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from disagg.config.errors import ConfigError


def read_private_file(path: Path, flag: str, max_nbytes: int) -> bytes:
    """The first `max_nbytes` of the file that `flag` names. Raises ConfigError when others may read it."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(max_nbytes)
    except OSError as exc:
        raise ConfigError(f"`{flag}` cannot be read: `{path}`: {(exc.strerror or str(exc)).lower()}") from None
    if mode & 0o077:
        raise ConfigError(f"`{path}` has mode {mode:04o} and others can read it: run `chmod 600 {path}`")
    return content
