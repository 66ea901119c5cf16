"""What a worker keeps of one attempt it was dispatched: the request, its peer, when it came, and how far it got."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from disagg.engine.commands import Serve
from disagg.transceiver.protocol.actions import AskExtension
from disagg.transceiver.wire.messages.router import Dispatch
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.messages.values import AttemptKey, FirstToken, StageTimes, UnitName
from disagg.worker.pairing import Pairing


@dataclass(slots=True)
class RequestState:
    """Live from DISPATCH until the attempt is over here. Times are this process's monotonic seconds."""

    dispatch: Dispatch
    pairing: Pairing
    arrived_at: float = field(default_factory=time.monotonic)
    reserved_at: float | None = None
    came: AskExtension | None = None
    """Of an answer that comes from another worker: what it has become there."""
    is_pressed: bool = False
    """It is preempted next, and the router has not heard of that."""
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

    epoch: int = field(init=False)
    """By which the router knows the attempt: another than the dispatch's after a move that failed."""

    def __post_init__(self) -> None:
        self.epoch = self.dispatch.epoch
        sampling, output = self.dispatch.sampling, self.dispatch.output
        going_on = [answer.choice for answer in output]
        self.ended = {choice for choice in range(sampling.num_choices) if output and choice not in going_on}
        self.in_turn = going_on[0] if going_on else 0

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(self.dispatch.transfer_id, self.dispatch.epoch)

    def begins_at(self, choice: int) -> int:
        """The index of the first token that this attempt gives to an answer; the newest of one that came here."""
        if self.came is not None:
            return len(self.came.output) - 1
        return next((len(answer.token_ids) for answer in self.dispatch.output if answer.choice == choice), 0)

    def first_tokens(self, first: FirstToken) -> Iterator[Tokens]:
        """The first token of every answer to the prompt, as the router is told."""
        transfer_id, epoch = self.dispatch.transfer_id, self.dispatch.epoch
        for choice in range(1 + len(first.others)):
            token, index = first.of(choice), self.begins_at(choice)
            logprobs = () if token.logprobs is None else (token.logprobs,)
            num_cached_tokens = 0 if index else first.num_cached_tokens
            yield Tokens(transfer_id, epoch, index, (token.token_id,), logprobs, num_cached_tokens, choice)

    def told_pressed(self) -> tuple[str, int]:
        """Its name for the lease that tells the router, which is not to be told again."""
        self.is_pressed = False
        return self.dispatch.transfer_id, self.epoch

    @property
    def is_unfetched(self) -> bool:
        """Whether it computes for a decode worker that has not asked yet, and holds soft blocks for that."""
        return self.dispatch.mode == "prefill" and not self.is_pinned and not self.soft_dropped

    def lacks_room_for(self, limit_s: float, now: float) -> bool:
        """Whether its peer has asked so long ago, and its blocks are still not held."""
        return self.pinned_at is not None and not self.has_room and now - self.pinned_at > limit_s

    @property
    def began_at(self) -> float:
        """When the router received the request, on this machine's clock."""
        return self.arrived_at - self.dispatch.age_s

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
