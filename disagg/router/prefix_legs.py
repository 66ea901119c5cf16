"""The prefixes that one request's workers are told to fetch: orders and grants while it is computed, then withdrawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from disagg.router.choose import Placement
from disagg.router.generation import GenerationRequest
from disagg.transceiver.wire.messages.router import CancelRequest, Grant, PeerTarget, PrefixLeg
from disagg.transceiver.wire.node import draw_id
from disagg.transceiver.wire.purposes import PREFIX
from disagg.transceiver.wire.schema import PackedInts
from disagg.transceiver.wire.ticket import LegClaims


@dataclass(frozen=True, slots=True)
class PrefixSource:
    """A worker that may be asked, up to where, and how it names its block that ends there."""

    target: PeerTarget
    boundary: int
    tip: bytes


Choose = Callable[[PeerTarget, Placement], PrefixSource | None]
"""(worker that computes the prompt, placement) -> where blocks of it may be had."""

MintPrefix = Callable[[LegClaims, float], bytes]


class PrefixLegs:
    """Of one request. `choose` and `mint` are the router's."""

    def __init__(self, request: GenerationRequest, transfer_id: str, choose: Choose, mint: MintPrefix) -> None:
        self._request, self._transfer_id = request, transfer_id
        self._choose, self._mint = choose, mint
        self._grants: list[tuple[str, Grant]] = []
        self._open: dict[str, tuple[str, int]] = {}
        """By leg: its source, and the epoch."""

    def order(self, epoch: int, sink: PeerTarget, placement: Placement, ttl_s: float) -> PrefixLeg | None:
        """What the worker that computes the prompt is told; its source is told by `take_grants`."""
        source = self._choose(sink, placement)
        if source is None:
            return None
        leg, target = draw_id(), source.target
        claims = LegClaims(
            purpose=PREFIX,
            transfer_id=leg,
            epoch=epoch,
            request=self._transfer_id,
            source=target.incarnation,
            sink=sink.incarnation,
            boundary=source.boundary,
            tip=source.tip,
        )
        tokens = cast(PackedInts, self._request.prompt[: source.boundary])
        salt = self._request.sampling.cache_salt
        grant = Grant(leg, epoch, self._transfer_id, PREFIX, sink, ttl_s, tokens, salt)
        self._grants.append((target.incarnation, grant))
        self._open[leg] = target.incarnation, epoch
        return PrefixLeg(leg, target, source.boundary, self._mint(claims, ttl_s))

    def take_grants(self) -> list[tuple[str, Grant]]:
        """(source, what to tell it) of the legs that were ordered since the last call."""
        grants, self._grants = self._grants, []
        return grants

    def withdraw(self) -> list[tuple[str, CancelRequest]]:
        """(source, what to tell it) of every leg: the prompt is computed, or will not be."""
        legs, self._open = self._open, {}
        return [(source, CancelRequest(leg, epoch, "unused")) for leg, (source, epoch) in legs.items()]
