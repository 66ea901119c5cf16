"""The sender's end of the tcp plane: plain sockets, straight out of the pools, for peers on another host.

`sendmsg` over the slots themselves: the kernel copies them once, into its own buffers, and no byte of payload passes
through Python or through memory of ours. Each receiver has one connection and one thread that sends on it, so a slow
receiver delays no other and the event loop never copies.

Nothing is encrypted: a reader of the network between the hosts can read KV. The token keeps strangers from being
served, the manifest's MAC and digests keep forged bytes from being decoded.
"""

from __future__ import annotations

import functools
import socket

from disagg.transceiver.planes.listening import ListeningSourcePlane
from disagg.transceiver.planes.tcp.sender import TcpSender


class TcpSourcePlane(ListeningSourcePlane[TcpSender]):
    name = "tcp"

    def _make_sender(self, sock: socket.socket, peer: str, token: bytes) -> TcpSender:
        return TcpSender(sock, functools.partial(self._lose, peer), functools.partial(self._probe, peer))
