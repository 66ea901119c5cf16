"""What libraries take for granted around a process, and what containers and deleted folders do not give."""

from __future__ import annotations

import os
import tempfile
from typing import Final

ROOT: Final = "/"
SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 (a last resort; every container has one that can be written)
COMPILER_CACHE: Final = "TORCHINDUCTOR_CACHE_DIR"


def leave_deleted_folder() -> None:
    """Go to `/` when the current folder is gone: MKL ends a process whose folder it cannot ask for."""
    try:
        os.getcwd()
    except OSError:
        os.chdir(ROOT)


def name_temporary_folder() -> None:
    """Let `tempfile` have a name where no folder can be written, as on a read-only root.

    Libraries ask for it when they are imported, and write to it only in features that are not used unless asked for:
    pools are memory files, and sockets have ports. What does write there gets its own error then. torch makes a folder
    in it for its compiler, unless it is told of one that exists.
    """
    try:
        tempfile.gettempdir()
    except OSError:
        tempfile.tempdir = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else ROOT
        os.environ.setdefault(COMPILER_CACHE, tempfile.tempdir)
