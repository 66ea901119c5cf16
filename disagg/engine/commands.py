"""Commands to the model thread and events back from it: it owns cache and scheduler and alone calls them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.values import AttemptKey as AttemptKey
from disagg.transceiver.wire.messages.values import FirstToken, GroupRuns, Sampling, TokenLogprobs, UnitName

NO_ATTEMPT: Final = AttemptKey("", 0)

BlockSlots = tuple[tuple[tuple[int, int], ...], ...]
"""Per layer group, (ordinal, slot) pairs, ascending."""

# --- commands -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Serve:
    """Compute the prompt and emit every token here (colocated, fallback, max_tokens 1). `urgent`: head of admission.

    `arrived_at`: seconds on this worker's clock; the last to arrive is preempted first.
    `output`, here and below: tokens of the answer that were emitted elsewhere. It goes on behind them, at the head of
    admission, since a client waits in the middle of it. `prefix_boundary`: see `Prefill`.
    """

    key: AttemptKey
    prompt: tuple[int, ...]
    sampling: Sampling
    urgent: bool = False
    priority: int = 0
    output: tuple[int, ...] = ()
    prefix_boundary: int = 0
    arrived_at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Prefill:
    """Compute the prompt and sample its first token; hold the KV until `Release`. Soft until `Pin`.

    `prefix_boundary`: another worker may have blocks of so many of its first tokens. If they are more than is cached
    here, `PrefixWantedEvent` says so when the prompt could begin, and it waits for `PrefixGivenUp` or `PrefixLanded`.
    """

    key: AttemptKey
    prompt: tuple[int, ...]
    sampling: Sampling
    priority: int = 0
    output: tuple[int, ...] = ()
    prefix_boundary: int = 0
    arrived_at: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Pin:
    """A FETCH was accepted: promise the peak, never drop from here. Answered by `PinnedEvent` when that is so."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Reserve:
    """Make room for KV to be received: history = prompt length, decode peak promised. Answered by `ReservedEvent`.

    `precision` names the formats the KV has been through; "" = this cache's own. KV is reused within one of them only.
    `output`: what is received, too, of an answer that another worker generated. One that `is_moved` is being generated
    there still, so that `Extend` adds to it.
    """

    key: AttemptKey
    prompt: tuple[int, ...]
    sampling: Sampling
    precision: str = ""
    priority: int = 0
    output: tuple[int, ...] = ()
    arrived_at: float = field(default=0.0, compare=False)
    is_moved: bool = False


@dataclass(frozen=True, slots=True)
class Extend:
    """The answer that a reservation waits for was frozen: the KV of `output` is what comes behind that of the prompt.

    Answered by another `ReservedEvent`, or by `MoveRefusedEvent` when there is no room for what it has become.
    """

    key: AttemptKey
    output: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Freeze:
    """Leave an answer out of the next steps and keep its blocks. Answered by `FrozenEvent` or `MoveRefusedEvent`.

    From then on it ends by `Release` alone, or goes on by `Thaw`. `leg`: of the transfer that it is for.
    """

    key: AttemptKey
    leg: str = ""


@dataclass(frozen=True, slots=True)
class Thaw:
    """Go on with a frozen answer. Nothing for one that is not frozen."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Decode:
    """The reservation's KV arrived, was verified and lies where kernels read it: emit the first token and decode on.

    `partial_blocks` received only the tokens that this request reads: no other request may reuse them.
    """

    key: AttemptKey
    verified: Verified
    partial_blocks: tuple[UnitName, ...] = ()


@dataclass(frozen=True, slots=True)
class Release:
    """Drop all that this attempt holds, in whatever state, every answer of it.

    Unknown keys are ignored (delivery is at least once).
    """

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class DropChoice:
    """Drop what one of an attempt's answers holds; the others go on. Unknown keys are ignored."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class DropSoft:
    """`fetch_wait_s` passed without FETCH: give the unpinned blocks back; `Pin` has them computed anew."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Unregister:
    """These blocks of an attempt failed verification at the peer: neither they nor what extends them may be reused."""

    key: AttemptKey
    units: tuple[UnitName, ...]


@dataclass(frozen=True, slots=True)
class PrefixChecked:
    """Answers `PrefixHitEvent`: which of its blocks are `right`, which are `wrong` and must not be reused."""

    key: AttemptKey
    check_id: int
    right: tuple[SourceUnit, ...]
    wrong: tuple[SourceUnit, ...]


@dataclass(frozen=True, slots=True)
class MakePrefixRoom:
    """The other worker's blocks reach up to `boundary`: make room for what is missing. Answered by `PrefixRoomEvent`.

    From then on the prompt's blocks are not taken, until `PrefixLanded` or `PrefixGivenUp`. It must not be released
    meanwhile: bytes may land in them.
    """

    key: AttemptKey
    boundary: int


@dataclass(frozen=True, slots=True)
class PrefixLanded:
    """The blocks that there is room for were verified, and lie where kernels read: compute from there.

    `partial_blocks` received only the tokens that this request reads: no other request may reuse them.
    """

    key: AttemptKey
    partial_blocks: tuple[UnitName, ...] = ()


@dataclass(frozen=True, slots=True)
class PrefixGivenUp:
    """Nothing lands for the prompt (any more): compute it from what is cached here."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class LendPrefix:
    """Find cached blocks of `tokens` for another worker, whose transfer is `key`. Answered by `PrefixLentEvent`.

    `held`: what that worker has, in blocks of `held_block_size`. What is lent is not held: when its room is wanted it
    goes, and `PrefixEvictedEvent` says so. `Release` ends the loan.
    """

    key: AttemptKey
    tokens: tuple[int, ...]
    salt: str
    held: tuple[GroupRuns, ...]
    held_block_size: int


Command = (
    Serve
    | Prefill
    | Pin
    | Reserve
    | Extend
    | Decode
    | Freeze
    | Thaw
    | Release
    | DropChoice
    | DropSoft
    | Unregister
    | PrefixChecked
    | MakePrefixRoom
    | PrefixLanded
    | PrefixGivenUp
    | LendPrefix
)


# --- events -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PinnedEvent:
    key: AttemptKey
    compute_id: int


@dataclass(frozen=True, slots=True)
class UnitsFinalEvent:
    """Only units that the receiver may need (protocol.md section 1) are reported, each once per `compute_id`."""

    key: AttemptKey
    compute_id: int
    units: tuple[SourceUnit, ...]


@dataclass(frozen=True, slots=True)
class PrefixHitEvent:
    """A prompt begins with these cached blocks, which were not hashed for a while. It waits for `PrefixChecked`."""

    key: AttemptKey
    check_id: int
    units: tuple[SourceUnit, ...]


@dataclass(frozen=True, slots=True)
class PrefixWantedEvent:
    """A prompt could begin: `own` tokens of it are cached here, `boundary` may be elsewhere.

    `held`: all ordinals below the boundary that are cached here.
    """

    key: AttemptKey
    boundary: int
    own: int
    held: tuple[GroupRuns, ...]


@dataclass(frozen=True, slots=True)
class PrefixRoomEvent:
    """Answers `MakePrefixRoom`. `slots`: where the missing blocks are to land; None: there is no room, or what was said
    to be here is gone.
    """

    key: AttemptKey
    boundary: int
    slots: BlockSlots | None


@dataclass(frozen=True, slots=True)
class PrefixLentEvent:
    """Answers `LendPrefix`: blocks reach up to `boundary`, 0 = none; `units` are those that the other worker lacks."""

    key: AttemptKey
    boundary: int
    units: tuple[SourceUnit, ...]


@dataclass(frozen=True, slots=True)
class PrefixEvictedEvent:
    """Blocks that were lent are gone: what is read of them from here on is something else."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class RegisteredEvent:
    """Blocks that are full and may be lent: to be hashed before their memory can change. Final ones that
    `UnitsFinalEvent` tells of are left out.
    """

    units: tuple[SourceUnit, ...]

    @property
    def key(self) -> AttemptKey:
        """Of no attempt: it waits for none, and none waits for it."""
        return NO_ATTEMPT


@dataclass(frozen=True, slots=True)
class SuspectEvent:
    """Answers `Unregister`: where the blocks lie that failed verification at the peer."""

    key: AttemptKey
    units: tuple[SourceUnit, ...]


@dataclass(frozen=True, slots=True)
class SoftDroppedEvent:
    key: AttemptKey
    compute_id: int


@dataclass(frozen=True, slots=True)
class PromptComputedEvent:
    """Follows every `UnitsFinalEvent` of the same `compute_id`. `finished`: the first token ends the answer."""

    key: AttemptKey
    compute_id: int
    first_token: FirstToken
    finished: bool
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class ReservedEvent:
    """`slots[g]` holds (ordinal, slot) pairs of group g, ascending, for exactly the blocks that must be received.

    Those that are needed and not listed were found in the cache, and are held from here on.
    """

    key: AttemptKey
    slots: BlockSlots


@dataclass(frozen=True, slots=True)
class FrozenEvent:
    """An answer stands still: `output` is all of it, the last token without KV, and `units` hold all that is read next.

    `logprobs`: of the newest tokens, where they are asked for; of all if those are few.
    """

    key: AttemptKey
    output: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    units: tuple[SourceUnit, ...]
    leg: str = ""


@dataclass(frozen=True, slots=True)
class MoveRefusedEvent:
    """Answers `Freeze` or `Extend`: this answer cannot be moved now. Nothing has changed."""

    key: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class PressedEvent:
    """Blocks are short: this answer gives way first, unless another worker takes it over. Told once in a block."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class PromptScoredEvent:
    """Log-probabilities of prompt tokens, in order from position 1; anew from there if the prompt is computed anew."""

    key: AttemptKey
    scores: PromptLogprobs


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """Generated tokens; the first has `index` (0 = first token of the answer).

    `num_cached_tokens`: with index 0, tokens of the prompt that the computing worker found in its cache.
    """

    key: AttemptKey
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The answer ended before `index`; its blocks are already free. `reason`: `stop` or `length`."""

    key: AttemptKey
    index: int
    reason: str
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The engine gave the attempt up and freed it. `status`: 400 can never fit, 500 non-finite logits, or no
    token could be sampled from them."""

    key: AttemptKey
    status: int
    message: str


EngineEvent = (
    PinnedEvent
    | UnitsFinalEvent
    | PrefixHitEvent
    | SuspectEvent
    | PrefixWantedEvent
    | PrefixRoomEvent
    | PrefixLentEvent
    | PrefixEvictedEvent
    | RegisteredEvent
    | SoftDroppedEvent
    | PromptComputedEvent
    | ReservedEvent
    | FrozenEvent
    | MoveRefusedEvent
    | PressedEvent
    | PromptScoredEvent
    | TokensEvent
    | FinishedEvent
    | FailedEvent
)
