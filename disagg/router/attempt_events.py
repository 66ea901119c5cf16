"""What can happen to a request at the router, and what the router does about it. Frozen; time is apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.transceiver.wire.messages.router import (
    CancelChoice,
    CancelRequest,
    Dispatch,
    Finished,
    Grant,
    PrefillLocally,
    PromptScores,
    RequestFailed,
    Resume,
    Retarget,
    TransferFailure,
    TransferReport,
)
from disagg.transceiver.wire.messages.tokens import Tokens

AnswerMessage = Tokens | PromptScores | Finished | RequestFailed | TransferFailure | TransferReport
"""What a worker may say of one attempt."""

OrderMessage = Dispatch | Retarget | PrefillLocally | CancelRequest | CancelChoice | Grant | Resume
"""What the router may say to it."""


# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answered:
    """The worker of incarnation `source` said `message` about this request."""

    source: str
    message: AnswerMessage


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The registry gave an incarnation up; nothing more will come from it and nothing reaches it.

    `in_step`: transfer id to epoch of the new requests of the step that it died in; empty when it left in good order.
    """

    incarnation: str
    reason: str
    in_step: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The client closed the stream: the answer has no reader."""


@dataclass(frozen=True, slots=True)
class ChoiceUnwanted:
    """The client has read all that it wants of one of several answers."""

    choice: int


@dataclass(frozen=True, slots=True)
class RouterClosing:
    """The router ends; what is live ends with it."""


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Time passed: act on what is overdue."""


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """The request was refused while it waited for its turn; no worker has heard of it."""

    status: int
    message: str


Event = Answered | WorkerLost | ClientGone | ChoiceUnwanted | RouterClosing | TimePassed | TurnedAway


# --- actions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SendOrder:
    """Give `message` to the worker of incarnation `to`."""

    to: str
    message: OrderMessage


@dataclass(frozen=True, slots=True)
class Emit:
    """Give the client tokens, or the end of its answer."""

    item: TokenChunk | GenerationEnd


@dataclass(frozen=True, slots=True)
class Fail:
    """End the client's answer with an error. `status` is true whether or not a token was sent before."""

    status: int
    message: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class WentOn:
    """An answer that lost its worker has its next token, emitted right after this; `is_exact` as `GoingOn` says."""

    choice: int
    is_exact: bool


@dataclass(frozen=True, slots=True)
class MoveEnded:
    """The answer is at its sink (`moved`, its next token follows), or stays or has ended where it was."""

    outcome: str


Action = SendOrder | Emit | Fail | WentOn | MoveEnded
