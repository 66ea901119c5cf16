"""The sender's end of the ucx plane: packed chunks through UCX, over whatever UCX finds between the two.

RDMA, cuda_ipc, process_vm_readv on one host, or TCP. Next to each pair of endpoints lies an ordinary socket: a peer
that shows its token there is served, and its end is the peer's death. Each receiver has one thread, which gathers and
sends.

Nothing is encrypted: a reader of the network between the hosts can read KV. A process that reaches UCX's own ports can
speak to UCX, whose protocol knows no strangers, but gets no KV: that is sent to endpoints of peers that showed a token.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Sequence

from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.planes.listening import ListeningSourcePlane
from disagg.transceiver.planes.ucx.library import library
from disagg.transceiver.planes.ucx.sender import UcxSender


class UcxSourcePlane(ListeningSourcePlane[UcxSender]):
    name = "ucx"

    async def start(self, pools: Sequence[PoolRegion]) -> None:
        """Listen. Raises `EndpointRefused`, also where ucxx is missing."""
        await asyncio.to_thread(library)
        await super().start(pools)

    def _make_sender(self, sock: socket.socket, peer: str, token: bytes) -> UcxSender:
        return UcxSender(sock, token, functools.partial(self._lose, peer), functools.partial(self._probe, peer))

    def _lose(self, peer: str, sender: object) -> None:
        """A receiver that hung up before its endpoints were paired goes on to its next plane: it is forgotten here."""
        current = self._senders.get(peer)
        if current is not None and current is sender and not current.is_open:
            del self._senders[peer]
            self._spawn(current.close(), self._closings)
        else:
            super()._lose(peer, sender)
