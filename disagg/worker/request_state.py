"""What a worker keeps of one attempt it was dispatched: the request, its peer, when it came, and how far it got."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from disagg.engine.commands import Serve
from disagg.transceiver.peers.decode_side import TransferRecord
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
    pinned_at: float | None = None
    has_room: bool = False
    """The engine holds its blocks for a peer that fetches them."""
    soft_dropped: bool = False
    is_reported: bool = False
    """Where the prompt is computed for this worker's own answer: the router was told how long that took."""
    first_token_sent: bool = False
    """The first token came with the transfer, and left when that was verified."""
    partial_blocks: tuple[UnitName, ...] = ()
    reserved: tuple[tuple[int, ...], ...] = ()
    """Per layer group, the slots that its transfer fills."""
    in_turn: int = field(init=False)
    """The choice that is being computed, or was last."""
    ended: set[int] = field(init=False)
    """Choices that are over here, or were before the attempt began."""
    to_follow: deque[Serve] = field(default_factory=deque)
    """Choices that go on: each is computed when the one before it has been, of whose blocks it reuses the prompt's."""

    def __post_init__(self) -> None:
        sampling, output = self.dispatch.sampling, self.dispatch.output
        going_on = [answer.choice for answer in output]
        self.ended = {choice for choice in range(sampling.num_choices) if output and choice not in going_on}
        self.in_turn = going_on[0] if going_on else 0

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(self.dispatch.transfer_id, self.dispatch.epoch)

    def begins_at(self, choice: int) -> int:
        """The index of the first token that this attempt gives to an answer."""
        return next((len(answer.token_ids) for answer in self.dispatch.output if answer.choice == choice), 0)

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


def transfer_times(state: RequestState, record: TransferRecord) -> StageTimes:
    """Of a handoff that landed here."""
    return StageTimes(tuple(_stages(state, record)))


def _stages(state: RequestState, record: TransferRecord) -> Iterator[tuple[str, float]]:
    """queue | transfer_wait | wire | verify: what passed between DISPATCH and the licence to decode, without a gap."""
    reserved_at = state.reserved_at or state.arrived_at
    first = record.first_slice_at or record.done_at
    landed = max(first, record.landed_at)
    yield "queue", reserved_at - state.arrived_at
    yield "transfer_wait", first - reserved_at
    yield "wire", landed - first
    yield "verify", record.done_at - landed
