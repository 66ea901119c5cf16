"""What the workers of a request are told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from disagg.router.attempt_events import SendOrder
from disagg.router.choose import Placement
from disagg.router.generation import GenerationRequest
from disagg.router.placer import Mint
from disagg.router.prefix_legs import PrefixLegs
from disagg.transceiver.wire.messages.router import Dispatch, PeerTarget, PrefixLeg
from disagg.transceiver.wire.messages.tokens import ChoiceOutput
from disagg.transceiver.wire.schema import PackedInts

Output = tuple[ChoiceOutput, ...]


class Orders:
    """Of one request. `output`: what the client has of its answers, where an attempt goes on with them."""

    def __init__(
        self, request: GenerationRequest, transfer_id: str, mint: Mint, deadline: float, legs: PrefixLegs | None = None
    ) -> None:
        """`legs`: the prefixes that its workers may fetch; none without."""
        self._request, self._transfer_id, self._mint, self._deadline = request, transfer_id, mint, deadline
        self._legs = legs

    def of_legs(self, *, is_needed: bool) -> list[SendOrder]:
        """For the sources of prefixes, since the last call; not `is_needed`: the prompt is computed, or will not be."""
        if self._legs is None:
            return []
        orders = [SendOrder(source, grant) for source, grant in self._legs.take_grants()]
        return orders if is_needed else orders + [SendOrder(*told) for told in self._legs.withdraw()]

    def alone(self, epoch: int, placement: Placement, output: Output, now: float) -> Dispatch:
        """For one worker that computes and answers."""
        ttl_s = self._remaining_s(now)
        return replace(
            self._dispatch("serve", epoch, output, ttl_s),
            prefix=self._leg(epoch, placement.server, placement, output, ttl_s),
        )

    def pair(self, epoch: int, placement: Placement, output: Output, now: float) -> tuple[Dispatch, Dispatch]:
        """For the prefill worker and for the decode worker, with one ticket."""
        server, prefill = placement.server, placement.prefill
        assert prefill is not None
        ttl_s = self._remaining_s(now)  # the dispatches' deadline too: the prefill worker checks the ticket with that
        sent: Sequence[int] = output[0].token_ids if output else ()
        ticket = self._mint(epoch, prefill.incarnation, server.incarnation, ttl_s, sent)
        leg = self._leg(epoch, prefill, placement, output, ttl_s)
        return (
            replace(self._dispatch("prefill", epoch, output, ttl_s, server, ticket), prefix=leg),
            self._dispatch("decode", epoch, output, ttl_s, prefill, ticket),
        )

    def _leg(
        self, epoch: int, sink: PeerTarget, placement: Placement, output: Output, ttl_s: float
    ) -> PrefixLeg | None:
        """An answer that goes on after a death is computed where it is placed."""
        return self._legs.order(epoch, sink, placement, ttl_s) if self._legs is not None and not output else None

    def _dispatch(
        self,
        mode: str,
        epoch: int,
        output: Output,
        deadline_s: float,
        peer: PeerTarget | None = None,
        ticket: bytes = b"",
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
            deadline_s=deadline_s,
            peer=peer,
            ticket=ticket,
            priority=request.priority,
            output=output,
        )

    def _remaining_s(self, now: float) -> float:
        return max(self._deadline - now, 0.0)
