"""What the workers of a request are told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from disagg.router.attempt_events import SendOrder
from disagg.router.choose import Placement
from disagg.router.generation import GenerationRequest
from disagg.router.placer import Mint, MintLeg
from disagg.router.prefix_legs import PrefixLegs
from disagg.transceiver.wire.messages.router import Dispatch, Grant, PeerTarget, PrefixLeg
from disagg.transceiver.wire.messages.tokens import ChoiceOutput
from disagg.transceiver.wire.purposes import MOVE
from disagg.transceiver.wire.schema import PackedInts

Output = tuple[ChoiceOutput, ...]


class Orders:
    """Of one request. `output`: what the client has of its answers, where an attempt goes on with them."""

    def __init__(
        self,
        request: GenerationRequest,
        transfer_id: str,
        mint: Mint,
        received_at: float,
        deadline: float,
        legs: PrefixLegs | None = None,
    ) -> None:
        """`legs`: the prefixes that its workers may fetch; none without."""
        self._request, self._transfer_id, self._mint = request, transfer_id, mint
        self._received_at, self._deadline, self._legs = received_at, deadline, legs

    def of_legs(self, *, is_needed: bool) -> list[SendOrder]:
        """For the sources of prefixes, since the last call; not `is_needed`: the prompt is computed, or will not be."""
        if self._legs is None:
            return []
        orders = [SendOrder(source, grant) for source, grant in self._legs.take_grants()]
        return orders if is_needed else orders + [SendOrder(*told) for told in self._legs.withdraw()]

    def alone(self, epoch: int, placement: Placement, output: Output, now: float) -> Dispatch:
        """For one worker that computes and answers."""
        leg = self._prefix(epoch, placement.server, placement, output, now)
        return replace(self._dispatch("serve", epoch, output, now), prefix=leg)

    def pair(self, epoch: int, placement: Placement, output: Output, now: float) -> tuple[Dispatch, Dispatch]:
        """For the prefill worker and for the decode worker, with one ticket."""
        server, prefill = placement.server, placement.prefill
        assert prefill is not None
        ttl_s = self._remaining_s(now)  # the dispatches' deadline too: the prefill worker checks the ticket with that
        sent: Sequence[int] = output[0].token_ids if output else ()
        ticket = self._mint(epoch, prefill.incarnation, server.incarnation, ttl_s, sent)
        leg = self._prefix(epoch, prefill, placement, output, now)
        return (
            replace(self._dispatch("prefill", epoch, output, now, server, ticket), prefix=leg),
            self._dispatch("decode", epoch, output, now, prefill, ticket),
        )

    def _prefix(
        self, epoch: int, sink: PeerTarget, placement: Placement, output: Output, now: float
    ) -> PrefixLeg | None:
        """None too for an answer that goes on after a death: it is computed where it is placed."""
        if self._legs is None or output:
            return None
        return self._legs.order(epoch, sink, placement, self._remaining_s(now))

    def move(
        self, epoch: int, leg: str, ends: tuple[PeerTarget, PeerTarget], output: Output, mint: MintLeg, now: float
    ) -> tuple[Grant, Dispatch]:
        """For the source and for the sink, in this order also in `ends`. `output`: of the one answer there is."""
        source, sink = ends
        ttl_s, count = self._remaining_s(now), len(output[0].token_ids)
        ticket = mint(leg, epoch, source.incarnation, sink.incarnation, count, ttl_s)
        grant = Grant(leg, epoch, self._transfer_id, MOVE, sink, ttl_s, num_tokens=count)
        return grant, self._dispatch("move", epoch, output, now, source, ticket, leg)

    def _dispatch(
        self,
        mode: str,
        epoch: int,
        output: Output,
        now: float,
        peer: PeerTarget | None = None,
        ticket: bytes = b"",
        leg: str = "",
    ) -> Dispatch:
        request = self._request
        return Dispatch(
            transfer_id=self._transfer_id,
            epoch=epoch,
            request_id=request.request_id,
            mode=mode,
            prompt=cast(PackedInts, request.prompt),  # an array is packed as it is
            # The client has the prompt's own log-probabilities when an answer goes on.
            sampling=replace(request.sampling, num_prompt_logprobs=None) if output else request.sampling,
            deadline_s=self._remaining_s(now),
            peer=peer,
            ticket=ticket,
            priority=request.priority,
            output=output,
            leg=leg,
            age_s=now - self._received_at,
        )

    def _remaining_s(self, now: float) -> float:
        return max(self._deadline - now, 0.0)
