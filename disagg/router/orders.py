"""What a worker is told of a request."""

from __future__ import annotations

from typing import cast

from disagg.router.generation import GenerationRequest
from disagg.transceiver.wire.messages.router import Dispatch, PeerTarget
from disagg.transceiver.wire.schema import PackedInts


def dispatch_of(
    request: GenerationRequest,
    transfer_id: str,
    epoch: int,
    mode: str,
    deadline_s: float,
    peer: PeerTarget | None,
    ticket: bytes,
) -> Dispatch:
    """One attempt of a request, for one of its workers."""
    return Dispatch(
        transfer_id=transfer_id,
        epoch=epoch,
        request_id=request.request_id,
        mode=mode,
        prompt=cast(PackedInts, request.prompt),  # an array is packed as it is
        sampling=request.sampling,
        deadline_s=deadline_s,
        peer=peer,
        ticket=ticket,
        priority=request.priority,
    )
