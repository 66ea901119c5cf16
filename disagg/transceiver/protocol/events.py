"""What can happen to one transfer: the inputs of `Transfer.handle`. Frozen; time is a separate argument.

The *sender* is the prefill side of one (transfer, epoch), the *receiver* the decode side.
"""

from __future__ import annotations

from dataclasses import dataclass

from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.wire.messages.peer import Refused, TransferMessage
from disagg.transceiver.wire.messages.values import FirstToken, GroupRuns, TokenLogprobs, UnitName


@dataclass(frozen=True, slots=True)
class LandedUnit:
    """One unit as it now lies in this process's pool. `digest` is of the destination; NaN or Inf: not `finite`."""

    group: int
    ordinal: int
    digest: int
    finite: bool = True


# --- both sides ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MessageArrived:
    """A message of this (transfer, epoch) whose header already named this incarnation as destination.

    REFUSED has no header; the shell delivers one that names a transfer and epoch to that transfer.
    """

    message: TransferMessage | Refused


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """The router, or this worker's own deadline or failure, ends the attempt."""

    reason: str


@dataclass(frozen=True, slots=True)
class PeerGone:
    """The peer's incarnation is lost. A dead incarnation counts as acknowledged."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: repeat what is unanswered, decide what is overdue."""


# --- sender -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    """A HEARTBEAT of the peer named this transfer and epoch: its sources stay pinned for another `LEASE_S`."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """The engine holds every block of computation `compute_id` until it is released: from here nothing is soft.

    Of a prefix: what it has cached reaches up to `boundary`, and is sent for as long as it is not evicted.
    """

    compute_id: int
    boundary: int = 0


@dataclass(frozen=True, slots=True)
class UnitsFinal:
    """Units of computation `compute_id` became final; those of another computation are stale and ignored."""

    compute_id: int
    units: tuple[HashedUnit, ...]


@dataclass(frozen=True, slots=True)
class SoftDropped:
    """The engine dropped the unpinned blocks of `compute_id`; it will compute them anew under another id."""

    compute_id: int


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """The whole prompt is computed and all its units were reported before this event."""

    compute_id: int
    first_token: FirstToken


@dataclass(frozen=True, slots=True)
class FinishedEarly:
    """The first token ended the answer (eos or a stop token): nothing needs to move."""

    compute_id: int


@dataclass(frozen=True, slots=True)
class ComputeFailed:
    """The engine cannot deliver (non-finite logits, bad request, out of room for good)."""

    reason: str


# --- receiver -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reserved:
    """Destinations exist for exactly these ordinals (need minus have). A handoff starts with FETCH then; a prefix asked
    before, and heard from its source what is needed.
    """

    required: tuple[GroupRuns, ...]
    prompt_len: int


@dataclass(frozen=True, slots=True)
class FetchWanted:
    """A prompt may begin with another worker's blocks: ask for them. Room is made once the source has said how many."""


@dataclass(frozen=True, slots=True)
class SliceLanded:
    """The landing job of slice `number` finished: these units lie in the pool, hashed there."""

    number: int
    units: tuple[LandedUnit, ...]


@dataclass(frozen=True, slots=True)
class LandingFailed:
    """The landing job of slice `number` failed (generation changed, link broken)."""

    number: int
    reason: str
    units: tuple[UnitName, ...] = ()


@dataclass(frozen=True, slots=True)
class LandingStopped:
    """No job of this epoch holds a destination slot any more (answers the action `StopLanding`)."""


# --- moves --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frozen:
    """Source: the answer stands still, and `output` is all of it. `logprobs`: of what the router has not, or none."""

    output: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class RoomMade:
    """Sink: room is reserved for the answer as the router has it; these whole blocks of it are held already."""

    held: tuple[GroupRuns, ...]


@dataclass(frozen=True, slots=True)
class Extended:
    """Sink: destinations exist for exactly these ordinals of what the answer has become (answers `AskExtension`)."""

    required: tuple[GroupRuns, ...]


@dataclass(frozen=True, slots=True)
class RoomRefused:
    """Sink: there is no room for what the answer has become (answers `AskExtension`)."""

    reason: str


SenderEvent = LeaseRenewed | Pinned | UnitsFinal | SoftDropped | PromptComputed | FinishedEarly | ComputeFailed
ReceiverEvent = FetchWanted | Reserved | SliceLanded | LandingFailed | LandingStopped
MoveEvent = Frozen | RoomMade | Extended | RoomRefused
Event = MessageArrived | CancelAsked | PeerGone | Tick | SenderEvent | ReceiverEvent | MoveEvent
