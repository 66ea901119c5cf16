"""The router's key, as a request's attempts use it: one ticket for each transfer that they order."""

from __future__ import annotations

from collections.abc import Sequence

from disagg.router.generation import GenerationRequest
from disagg.transceiver.wire import ticket


class Minting:
    """Of one request; `transfer_id` is its own, also where a leg has another."""

    def __init__(self, key: bytes, transfer_id: str, request: GenerationRequest) -> None:
        self._key, self._transfer_id, self._request = key, transfer_id, request

    def handoff(self, epoch: int, prefill: str, decode: str, ttl_s: float, output: Sequence[int]) -> bytes:
        """See `disagg.router.placer.Mint`."""
        return ticket.mint(
            self._key,
            transfer_id=self._transfer_id,
            epoch=epoch,
            prefill=prefill,
            decode=decode,
            prompt=self._request.prompt,
            ttl_s=ttl_s,
            output=output,
        )

    def move(self, leg: str, epoch: int, source: str, sink: str, num_tokens: int, ttl_s: float) -> bytes:
        """See `disagg.router.placer.MintLeg`."""
        prompt = self._request.prompt
        claims = ticket.move_claims(leg, epoch, self._transfer_id, source, sink, prompt, num_tokens)
        return ticket.mint_leg(self._key, claims, ttl_s)
