"""What a worker keeps of one attempt it was dispatched: the request, its peer, when it came, and how far it got."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from disagg.transceiver.wire.messages.router import Dispatch
from disagg.transceiver.wire.messages.values import AttemptKey, StageTimes, UnitName
from disagg.worker.pairing import Pairing


@dataclass(slots=True)
class RequestState:
    """Live from DISPATCH until the attempt is over here. Times are this process's monotonic seconds."""

    dispatch: Dispatch
    pairing: Pairing
    arrived_at: float = field(default_factory=time.monotonic)
    reserved_at: float | None = None
    is_pinned: bool = False
    soft_dropped: bool = False
    first_token_sent: bool = False
    """The first token came with the transfer, and left when that was verified."""
    partial_blocks: tuple[UnitName, ...] = ()
    reserved: tuple[tuple[int, ...], ...] = ()
    """Per layer group, the slots that its transfer fills."""
    ended: set[int] = field(default_factory=set)
    """Choices that are over here."""

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(self.dispatch.transfer_id, self.dispatch.epoch)

    @property
    def is_over(self) -> bool:
        """Whether every answer to its prompt is."""
        return len(self.ended) == self.dispatch.sampling.num_choices

    @property
    def deadline(self) -> float:
        """Counted from receipt: the router's duration, this machine's clock."""
        return self.arrived_at + self.dispatch.deadline_s

    def since_arrival(self, stage: str) -> StageTimes:
        return StageTimes(((stage, time.monotonic() - self.arrived_at),))
