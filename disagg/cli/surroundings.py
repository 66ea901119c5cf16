"""What libraries take for granted around a process, and what containers and deleted folders do not give."""

from __future__ import annotations

import os
import tempfile
from typing import Final

ROOT: Final = "/"
SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 (a last resort; every container has one that can be written)


def leave_deleted_folder() -> None:
    """Go to `/` when the current folder is gone: MKL ends a process whose folder it cannot ask for."""
    try:
        os.getcwd()
    except OSError:
        os.chdir(ROOT)


def name_temporary_folder() -> None:
    """Let `tempfile` have a name where no folder can be written, as on a read-only root.

    Libraries ask for it when they are imported and write to it only in features that are not used here: ours keeps
    pools in memory files, and sockets have ports. What does write there gets its own error then.
    """
    try:
        tempfile.gettempdir()
    except OSError:
        tempfile.tempdir = SHARED_MEMORY
