"""`disagg` in a process that may open so many files and no more: `python limited.py NUM_FILES COMMAND FLAGS...`."""

from __future__ import annotations

import resource
import sys

if __name__ == "__main__":
    num_files = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))  # the hard one too: nothing is left to raise
    from disagg.cli.main import main

    sys.exit(main(sys.argv[2:]))
