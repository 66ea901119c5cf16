"""What the engine computes: a prompt, room for one that will arrive, and an answer being decoded.

A `DecodingSequence` is built from exactly one licence: `Verified`, the transfer's word that received KV is whole, or
`Computed`, this engine's own finished prefill. Nothing else makes one, so unverified KV is never decoded.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from disagg.cache.cache import CachedSequence, Held
from disagg.engine.commands import AttemptKey, BlockSlots
from disagg.engine.sampling.seen import SeenTokens
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.wire.messages.values import (
    Ending,
    FirstToken,
    OtherFirst,
    Sampling,
    SamplingState,
    TokenLogprobs,
)

KEPT_LOGPROBS: Final = 256
"""Newest tokens of an answer whose log-probabilities are kept for a worker that takes it over: a router is seconds
behind at most, and a token that it lacks is among these."""

UNKNOWN: Final = -1
"""Stands for a token that a launched step draws: no id is negative."""


@dataclass(frozen=True, slots=True)
class Request:
    """One attempt's prompt and how to sample from it. `seen`: what penalties count, kept from token to token.

    `priority`: lower ones are admitted first and preempted last, of equals those that came first: `arrived_at` is on
    this worker's clock, also of a request that another worker had first. `emitted`: the answer's tokens that an earlier
    attempt gave. They are computed with the prompt, or come with its KV, and count as the answer.
    """

    key: AttemptKey
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int = 0
    emitted: tuple[int, ...] = ()
    arrived_at: float = 0.0
    seen: SeenTokens = field(default_factory=SeenTokens, compare=False, repr=False)

    @property
    def prompt_len(self) -> int:
        return len(self.prompt)

    @property
    def known(self) -> tuple[int, ...]:
        """Tokens before the first that this attempt samples."""
        return self.prompt + self.emitted

    @property
    def num_known(self) -> int:
        return len(self.prompt) + len(self.emitted)

    def of_choice(self, choice: int) -> Request:
        """The request for one of the answers alone."""
        if not choice:
            return self
        key, sampling = replace(self.key, choice=choice), self.sampling.of_choice(choice)
        return Request(key, self.prompt, sampling, arrived_at=self.arrived_at)

    @property
    def total_tokens(self) -> int:
        """Prompt and the longest answer."""
        return len(self.prompt) + self.sampling.max_tokens

    def ending_after(self, token_id: int, num_output_tokens: int) -> Ending | None:
        """Whether `token_id`, as the last of so many output tokens, ends the answer."""
        return self.sampling.ending_after(token_id, num_output_tokens)


class Claim(Enum):
    """What a prompt is computed for."""

    OWN = "this worker's own answer"
    SOFT = "a decode worker that has not asked for it yet"
    PINNED = "a decode worker that has asked for it"


class Stage(Enum):
    """How far the computation of a prompt is. It holds blocks from FETCHING on."""

    WAITING = "in a line"
    PARKED = "soft, and dropped or told not to run ahead: computed only once it is pinned"
    FETCHING = "another worker was asked for blocks that it begins with"
    LANDING = "there is room for these, and bytes may land in it: until that is over nothing takes its blocks"
    CHECKING = "the blocks it was given for reuse are hashed again: nothing is computed from them before they are known"
    COMPUTING = "its prompt is being computed"
    HELD = "whole, until it is released or dropped"


_NEXT: Final[dict[Stage, frozenset[Stage]]] = {
    Stage.WAITING: frozenset({Stage.WAITING, Stage.PARKED, Stage.FETCHING, Stage.CHECKING, Stage.COMPUTING}),
    Stage.PARKED: frozenset({Stage.PARKED, Stage.WAITING}),
    Stage.FETCHING: frozenset({Stage.LANDING, Stage.CHECKING, Stage.COMPUTING, Stage.PARKED, Stage.WAITING}),
    Stage.LANDING: frozenset({Stage.CHECKING, Stage.COMPUTING}),
    Stage.CHECKING: frozenset({Stage.CHECKING, Stage.COMPUTING, Stage.PARKED, Stage.WAITING}),
    Stage.COMPUTING: frozenset({Stage.HELD, Stage.PARKED, Stage.WAITING}),
    Stage.HELD: frozenset({Stage.PARKED}),
}
"""Back to WAITING by preemption, or by a pin; back to PARKED when soft blocks are dropped."""


@dataclass(slots=True, eq=False)
class PromptSequence:
    """A prompt computed here: for this worker's own answer, or for a decode worker, soft until pinned.

    One that has an `answer` was preempted while decoding: its prompt is computed anew with what it had generated.
    """

    request: Request
    claim: Claim
    stage: Stage = field(default=Stage.WAITING, init=False)
    cached: CachedSequence | None = None
    compute_id: int = 0
    """Raised when computed blocks are dropped: what was said about them is stale."""
    num_cached_tokens: int | None = None
    """Tokens of the prompt that its first computation found in the cache; None before it began."""
    check_id: int = 0
    """Raised with each check of its reused blocks: the result of an older one says nothing."""
    answer: DecodingSequence | None = None
    token_ids: tuple[int, ...] = field(init=False)
    """What is computed: the prompt, and the answer so far."""
    num_announced: list[int] = field(default_factory=list)
    """Per layer group, how many of its needed ordinals were reported final in this computation."""
    num_ahead: int = 0
    """Tokens of it that a launched step computes."""
    prefix_boundary: int = 0
    """Tokens up to which another worker may have blocks of it; 0 once it was asked, or if none is to be."""
    known_here: tuple[NDArray[np.int64], ...] = ()
    """Per layer group, the ordinals below that boundary that were cached here when the other worker was asked."""
    awaited: BlockSlots | None = None
    """The blocks that its transfer fills."""

    def __post_init__(self) -> None:
        self.token_ids = self.request.prompt + tuple(self.answer.output) if self.answer else self.request.known

    @property
    def key(self) -> AttemptKey:
        return self.request.key

    def enter(self, stage: Stage) -> None:
        """Move on, or back. Raises `AssertionError` where no step leads."""
        assert stage in _NEXT[self.stage], f"{self.key}: from {self.stage.name} to {stage.name}"
        self.stage = stage

    @property
    def serves(self) -> bool:
        return self.claim is Claim.OWN

    @property
    def is_soft(self) -> bool:
        return self.claim is Claim.SOFT

    @property
    def is_scored(self) -> bool:
        """The prompt's own log-probabilities are asked for and not all reported, so every position is computed."""
        return self.request.sampling.num_prompt_logprobs is not None and self.answer is None

    @property
    def has_looked(self) -> bool:
        """Its request has looked for a cached prefix: hit rates count the first look only."""
        is_first = self.answer is None and not self.request.emitted
        return not is_first or self.check_id > 0 or self.num_cached_tokens is not None

    @property
    def num_computed(self) -> int:
        return self.cached.history if self.cached else 0

    @property
    def num_remaining(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def is_computing(self) -> bool:
        return self.stage is Stage.COMPUTING

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Those at positions [start, stop)."""
        return self.token_ids[start:stop]


@dataclass(slots=True, eq=False)
class Reservation:
    """Room for a prompt's KV that will be received, with that of `request.emitted`; `cached` once it is granted.

    `awaited`: per group, the (ordinal, slot) pairs that the transfer fills. `held`: ordinals that it need not fill.
    """

    request: Request
    precision: str = ""
    cached: CachedSequence | None = None
    awaited: BlockSlots = ()
    held: Held = ()

    @property
    def key(self) -> AttemptKey:
        return self.request.key


@dataclass(frozen=True, slots=True)
class Computed:
    """This engine finished `prompt` itself and sampled `first_token` at position P: the licence to decode own KV."""

    prompt: PromptSequence
    first_token: FirstToken

    def __post_init__(self) -> None:
        assert self.prompt.is_computing, f"{self.prompt.key}: nothing is being computed"
        assert self.prompt.num_remaining == 0, f"{self.prompt.key}: {self.prompt.num_remaining} tokens are missing"

    @property
    def key(self) -> AttemptKey:
        return self.prompt.key


@dataclass(slots=True, eq=False)
class DecodingSequence:
    """An answer being decoded. `output` starts as what was emitted before and the licence's token, which has no KV yet.

    That of each of several answers that go on is licensed by a prompt of its own.
    """

    request: Request
    cached: CachedSequence
    licence: Verified | Computed
    output: list[int] = field(init=False)
    num_ahead: int = 0
    """Launched steps whose tokens are not known yet."""
    frozen_for: str | None = None
    """The transfer for which it takes no part in steps and keeps what it holds: another worker may go on with it."""
    named_at: int | None = None
    """Its tokens when the worker last heard that it gives way first."""
    logprobs: deque[TokenLogprobs] = field(init=False, repr=False)
    """Of its newest tokens, where they are asked for."""

    def __post_init__(self) -> None:
        assert _licensed_key(self.licence) in (self.key, self.key.attempt), f"{self.key}: licensed for {self.licence}"
        assert self.cached.history == self.request.num_known, f"{self.key}: the prompt's KV is not whole"
        self.output = [*self.request.emitted, self.first.token_id]
        self.logprobs = deque(maxlen=KEPT_LOGPROBS)

    @property
    def key(self) -> AttemptKey:
        return self.request.key

    @property
    def first(self) -> OtherFirst:
        """The first token, as the prompt's worker sampled it for this answer."""
        return self.licence.first_token.of(self.key.choice - _licensed_key(self.licence).choice)

    @property
    def num_sampled(self) -> int:
        """Tokens of this attempt."""
        return len(self.output) - len(self.request.emitted)

    @property
    def num_stored(self) -> int:
        """Tokens whose KV is computed, or will be by launched steps: all but the last, fed next at this position."""
        return self.request.prompt_len + len(self.output) + self.num_ahead - 1

    @property
    def next_input(self) -> int:
        """The token that the next step feeds; `UNKNOWN` while the step that draws it is under way."""
        return UNKNOWN if self.num_ahead else self.output[-1]

    @property
    def is_frozen(self) -> bool:
        return self.frozen_for is not None

    @property
    def is_continued(self) -> bool:
        """Whether a token may follow those known and those under way."""
        return not self.is_frozen and len(self.output) + self.num_ahead < self.request.sampling.max_tokens

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Those at positions [start, stop), prompt and answer alike."""
        prompt_len = self.request.prompt_len
        answer = self.output[max(0, start - prompt_len) : max(0, stop - prompt_len)]
        return self.request.prompt[start:stop] + tuple(answer)

    def resume(self, computed: PromptSequence) -> None:
        """Go on after a preemption, on KV that this engine computed again for all tokens so far."""
        assert computed.answer is self
        assert computed.cached is not None
        assert computed.num_remaining == 0, f"{self.key}: {computed.num_remaining} tokens are missing"
        self.cached = computed.cached

    def ending(self) -> Ending | None:
        return self.request.ending_after(self.output[-1], len(self.output))


LiveSequence = PromptSequence | Reservation | DecodingSequence


def state_of(sequence: LiveSequence) -> str:
    """`waiting`, `prefilling`, `held` (computed for a decode worker), `reserved` (its KV is to come) or `decoding`."""
    if sequence.cached is None:
        return "waiting"
    if isinstance(sequence, DecodingSequence):
        return "decoding"
    if isinstance(sequence, Reservation):
        return "reserved"
    return "held" if sequence.stage is Stage.HELD else "prefilling"


def _licensed_key(licence: Verified | Computed) -> AttemptKey:
    if isinstance(licence, Computed):
        return licence.key
    return AttemptKey(licence.transfer_id, licence.epoch)


def first_token_of(
    prompt: PromptSequence, token_id: int, logprobs: TokenLogprobs | None, others: tuple[OtherFirst, ...] = ()
) -> FirstToken:
    """The token sampled at position P with the state that a decode worker continues from: seed, and tokens so far."""
    state = SamplingState(prompt.request.sampling.seed, ((token_id, 1),))
    return FirstToken(token_id, logprobs, state, prompt.num_cached_tokens or 0, others)
