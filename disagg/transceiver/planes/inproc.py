"""Both ends in one process: the sender's pools are plain memory here. For tests, and to time all but the copying."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.planes.reading import ReadingLandingPlane, ReadSourcePlane
from disagg.transceiver.planes.tokens import OneTimeTokens
from disagg.transceiver.wire.errors import PlaneRefused
from disagg.transceiver.wire.messages.values import PlaneOffer


class InprocHub:
    """The source planes of this process by address; sources and landing planes that share a hub find each other."""

    def __init__(self) -> None:
        self.sources: dict[str, InprocSourcePlane] = {}


class InprocSourcePlane(ReadSourcePlane):
    name = "inproc"

    def __init__(self, hub: InprocHub) -> None:
        self._hub = hub
        self._address = secrets.token_hex(8)
        self._tokens = OneTimeTokens()
        self._readers: dict[str, InprocLandingPlane] = {}
        self.pools: tuple[PoolRegion, ...] = ()

    async def start(self, pools: Sequence[PoolRegion]) -> None:
        self.pools = tuple(pools)
        self._hub.sources[self._address] = self

    def offer(self, peer: str) -> PlaneOffer:
        return PlaneOffer(self.name, self._address, self._tokens.mint(peer))

    def admit(self, peer: str, token: bytes, reader: InprocLandingPlane) -> None:
        """Let `reader` read these pools as `peer`. Raises `PlaneRefused`."""
        if not self._tokens.redeem(peer, token):
            raise PlaneRefused("inproc: the token is not the one offered to this peer, or was used before")
        previous = self._readers.get(peer)
        self._readers[peer] = reader
        if previous is not None:
            previous.end()

    def leave(self, peer: str, reader: InprocLandingPlane) -> None:
        """`reader` closed by itself."""
        if self._readers.get(peer) is reader:
            del self._readers[peer]
            if self.on_peer_lost is not None:
                self.on_peer_lost(peer)

    async def drop(self, peer: str) -> None:
        self._tokens.revoke(peer)
        reader = self._readers.pop(peer, None)
        if reader is not None:
            reader.end()

    async def close(self) -> None:
        self._hub.sources.pop(self._address, None)
        for peer in tuple(self._readers):
            await self.drop(peer)


class InprocLandingPlane(ReadingLandingPlane):
    name = "inproc"

    def __init__(self, hub: InprocHub) -> None:
        super().__init__()
        self._hub = hub
        self._source: InprocSourcePlane | None = None
        self._me = ""

    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        source = self._hub.sources.get(offer.address)
        if source is None:
            raise PlaneRefused("inproc: the source is not in this process; use shm or zmq")
        source.admit(me, offer.token, self)
        self._source, self._me = source, me
        self._open(source.pools, pools)

    def end(self) -> None:
        """The source let go of this reader."""
        self._lose()

    async def close(self) -> None:
        self._is_lost = True
        if self._source is not None:
            self._source.leave(self._me, self)
        self._source, self._sources, self._pools = None, (), ()
