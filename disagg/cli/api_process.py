"""`python -m disagg.cli.api_process LINK_FD LISTENING_FD LOG_LEVEL`: what a router starts for each API process."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

from disagg.cli.lifeline import die_with_parent
from disagg.cli.logs import set_up_logs


def main(argv: list[str]) -> int:
    """Serve until the router is gone or says stop; the exit code."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # sent to a whole group at times; the router decides
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    link, listening, log_level = argv
    set_up_logs(log_level, role="api")
    from disagg.api.processes.process import serve_clients

    asyncio.run(serve_clients(socket.socket(fileno=int(link)), socket.socket(fileno=int(listening))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
