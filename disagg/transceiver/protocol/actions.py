"""What a transfer wants done: outputs of `Transfer.handle`. The shell performs them in order and decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.wire.messages.peer import Refused, Slice, TransferMessage
from disagg.transceiver.wire.messages.values import FirstToken, GroupRuns, TokenLogprobs, UnitName


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to the peer on the control link."""

    message: TransferMessage | Refused


@dataclass(frozen=True, slots=True)
class SendPayload:
    """Sender, byte-sending planes only: send the units of this slice once."""

    number: int
    units: tuple[SourceUnit, ...]


@dataclass(frozen=True, slots=True)
class AskPin:
    """Sender: a FETCH was accepted; the engine must pin the request's blocks and answer with `Pinned`.

    Source of a move: it must freeze the answer, and answer with `Frozen`.
    """


@dataclass(frozen=True, slots=True)
class AskPrefix:
    """Sender of a prefix: the engine must find its cached blocks of the granted tokens and answer with `Pinned`.

    `held`: per group, what the sink has, in blocks of the sink.
    """

    held: tuple[GroupRuns, ...]


@dataclass(frozen=True, slots=True)
class ReleaseSource:
    """Sender, once per epoch: the peer needs nothing any more, the engine frees the request. Of a move it does so only
    when it was `acked`: else the answer is this worker's still, frozen or not, and the router says what becomes of it.

    `reason`: `acked`, `finished`, `cancelled`, `lost`, `deadline` or `failed`.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Land:
    """Receiver: land this slice into the reserved destinations; answer `SliceLanded` or `LandingFailed`."""

    message: Slice


@dataclass(frozen=True, slots=True)
class AskRoom:
    """Receiver of a prefix, once: make room for these units and answer with `Reserved`."""

    boundary: int
    required: tuple[GroupRuns, ...]


@dataclass(frozen=True, slots=True)
class StopLanding:
    """Receiver: stop and join every landing job of this epoch; answer `LandingStopped`."""


@dataclass(frozen=True, slots=True)
class AskExtension:
    """Sink of a move: the answer is this long; make room for all of it and answer `Extended` or `RoomRefused`.

    `logprobs`: of the last of `output`, as many as the router has not, or none.
    """

    output: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """Receiver, once: every MAC holds and verified units cover what was required. The only licence to decode them."""

    transfer_id: str
    epoch: int
    first_token: FirstToken


@dataclass(frozen=True, slots=True)
class PartVerified:
    """Receiver, once, in place of `Verified` where ranks are joined: this pair of ranks is done. No licence.

    `first_token` comes from the prefill worker's rank 0.
    """

    first_token: FirstToken | None


@dataclass(frozen=True, slots=True)
class PrefixVerified:
    """Receiver of a prefix, once: cached blocks up to `boundary` are whole, 0 = there were none. They may be registered
    for reuse, and no answer may be decoded from them: that takes `Verified`, which this is not.
    """

    transfer_id: str
    epoch: int
    boundary: int


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """Receiver, once: this epoch failed, its landing jobs are joined. `reason` is for the router."""

    reason: str
    units: tuple[UnitName, ...] = ()


@dataclass(frozen=True, slots=True)
class FreeReservation:
    """Receiver: the request ended without decoding (cancelled, or finished at prefill): its slots may be freed."""

    reason: str


@dataclass(frozen=True, slots=True)
class UnregisterUnits:
    """Sender: the peer's digests disagree for these units: they, and blocks that extend them, must not be reused."""

    units: tuple[UnitName, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """The transfer is over; the shell answers repeats from its `Tombstones` until `until` (clock seconds)."""

    until: float


Action = (
    Send
    | SendPayload
    | AskPin
    | AskPrefix
    | AskRoom
    | ReleaseSource
    | AskExtension
    | Land
    | StopLanding
    | Verified
    | PartVerified
    | PrefixVerified
    | ReportFailed
    | FreeReservation
    | UnregisterUnits
    | Forget
)
