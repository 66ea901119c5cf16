"""The two sides of a worker in a transfer: they run the protocol over sockets, planes and threads."""
