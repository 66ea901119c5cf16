"""`disagg`, as a worker of the next major version of the protocol."""

from __future__ import annotations

import sys

from disagg.transceiver.wire import codec

if __name__ == "__main__":
    codec.PROTOCOL = (codec.PROTOCOL[0] + 1, 0)  # type: ignore[misc]
    from disagg.cli.main import main

    sys.exit(main(sys.argv[1:]))
