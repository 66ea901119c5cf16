"""Values that messages carry: what a worker is, how its cache is cut, how to sample.

Frozen and validated where they are built, so that a decoded message is a legal one. Ids are lower-case hex
strings (32 digits, 128 random bits) so that logs, JSON and the wire show the same name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, Final

from disagg.transceiver.wire.messages.ranges import (
    MAX_ADDRESS_CHARS,
    MAX_BLOCK_SIZE,
    MAX_GROUPS,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_INT32,
    MAX_INT64,
    MAX_ITEMS,
    MAX_LAYERS,
    MAX_NAME_CHARS,
    MAX_NAMED_UNITS,
    MAX_ORDINAL,
    MAX_RANKS,
    MAX_RUNS,
    MAX_SECRET_NBYTES,
    MAX_SLICE_UNITS,
    MAX_SLOT_NBYTES,
    MAX_TEXT_CHARS,
    check_int,
    check_ints,
    check_names,
    check_size,
    fail,
)
from disagg.transceiver.wire.messages.sampling_limits import (
    CHOICE_SEEDS,
    LARGEST_INT64,
    LARGEST_LOGIT,
    LARGEST_SEED,
    MAX_BIASES,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKENS,
    check_above,
    check_count,
    check_ids,
    check_number,
)

MAX_TOP: Final = 128
"""Most likely tokens told beside the chosen one; the API gives at most 20."""

MAX_COUNTED: Final = 1024
"""Tokens generated before a transfer, by id: today's transfers follow the first one."""

IDENTITY_NBYTES: Final = 16
"""Of a block's identity, a keyed hash of its tokens and all before them."""

MAX_LABELS: Final = 64
"""Labels of a metric, and stages of a request: each has a handful."""

Run = tuple[int, int]
"""(first ordinal, number of ordinals)"""

HeadScales = Annotated[tuple[float, ...], MAX_HEADS]
LayerScales = tuple[HeadScales, HeadScales]
"""What a stored number of a layer is worth: (of K, of V), one per KV head."""


@dataclass(frozen=True, slots=True, order=True)
class AttemptKey:
    """One attempt of one request: the transfer id names the request, the epoch the attempt.

    Where an engine gives several answers to the prompt, `choice` tells them apart; the attempt's own key has 0.
    """

    transfer_id: str
    epoch: int
    choice: int = 0

    @property
    def attempt(self) -> AttemptKey:
        return AttemptKey(self.transfer_id, self.epoch) if self.choice else self


@dataclass(frozen=True, slots=True)
class GroupSemantics:
    """What one layer group attends to and stores: groups of two workers match by these fields."""

    window: int | None
    num_sink_tokens: int
    num_kv_heads: int
    head_dim: int
    layers: Annotated[tuple[int, ...], MAX_LAYERS]

    def __post_init__(self) -> None:
        if self.window is not None:
            check_int("window", self.window, 1, MAX_INT32)
        check_int("num_sink_tokens", self.num_sink_tokens, 0, MAX_INT32)
        check_int("num_kv_heads", self.num_kv_heads, 1, MAX_HEADS)
        check_int("head_dim", self.head_dim, 1, MAX_HEAD_DIM)
        check_size("layers", self.layers, MAX_LAYERS, 1)
        check_ints("layers", self.layers, 0, MAX_LAYERS - 1)
        if any(a >= b for a, b in pairwise(self.layers)):
            fail("layers", self.layers, "ascending indexes")


@dataclass(frozen=True, slots=True)
class Identity:
    """Facts that must be equal on both sides; the first field that differs is named in the refusal."""

    protocol_major: int
    model_fingerprint: str
    attention: str
    compute_dtype: str
    max_model_len: int
    hash_key_id: str
    adapter_ids: Annotated[tuple[str, ...], MAX_ITEMS] = ()

    def __post_init__(self) -> None:
        check_int("protocol_major", self.protocol_major, 0, MAX_INT32)
        check_int("max_model_len", self.max_model_len, 1, MAX_INT32)
        for name in ("model_fingerprint", "compute_dtype", "hash_key_id"):
            check_size(name, getattr(self, name), MAX_NAME_CHARS)
        check_size("attention", self.attention, MAX_TEXT_CHARS)
        check_size("adapter_ids", self.adapter_ids, MAX_ITEMS)
        check_names("adapter_ids", self.adapter_ids)


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a worker lays its cache out. May differ where units convert it, as
    `disagg.transceiver.layout.compatibility.geometry_difference` says.

    `groups` and `kv_scales` are the whole model's; `slot_nbytes` those of the pools of this `rank`. `kv_scales[g]`:
    one entry per layer of group g, or none where all are 1.0; `()` when that is so everywhere. `stages`: the model
    layer indexes of each pipeline stage; `()` = one stage holds them all. Flat rank = stage * tensor ranks + its rank.
    """

    block_size: int
    kv_dtype: str
    groups: Annotated[tuple[GroupSemantics, ...], MAX_GROUPS]
    slot_nbytes: Annotated[tuple[int, ...], MAX_GROUPS]
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    slot_layout: str = "layer-kv-head-token-dim"
    kv_scales: Annotated[tuple[Annotated[tuple[LayerScales, ...], MAX_LAYERS], ...], MAX_GROUPS] = ()
    stages: Annotated[tuple[Annotated[tuple[int, ...], MAX_LAYERS], ...], MAX_RANKS] = ()
    rank: int = 0

    def __post_init__(self) -> None:
        check_int("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        check_size("kv_dtype", self.kv_dtype, MAX_NAME_CHARS)
        check_size("slot_layout", self.slot_layout, MAX_NAME_CHARS)
        check_size("groups", self.groups, MAX_GROUPS, 1)
        check_size("slot_nbytes", self.slot_nbytes, MAX_GROUPS)
        check_ints("slot_nbytes", self.slot_nbytes, 1, MAX_SLOT_NBYTES)
        check_int("tensor_parallel_size", self.tensor_parallel_size, 1, MAX_RANKS)
        check_int("pipeline_parallel_size", self.pipeline_parallel_size, 1, MAX_RANKS)
        check_int("rank", self.rank, 0, MAX_RANKS**2 - 1)
        check_size("stages", self.stages, MAX_RANKS)
        for stage in self.stages:
            check_size("stages", stage, MAX_LAYERS)
            check_ints("stages", stage, 0, MAX_LAYERS - 1)
        self._check_scales()

    def _check_scales(self) -> None:
        """Numbers that multiply. How many there must be `pairing` says, which can name both sides' values."""
        check_size("kv_scales", self.kv_scales, MAX_GROUPS)
        for layers in self.kv_scales:
            check_size("kv_scales", layers, MAX_LAYERS)
            for half in (half for pair in layers for half in pair):
                check_size("kv_scales", half, MAX_HEADS)
                if half and not (min(half) > 0 and max(half) < math.inf and sum(half) > 0):  # a sum with NaN is none
                    fail("kv_scales", half, "finite numbers above 0")


@dataclass(frozen=True, slots=True)
class PlaneOffer:
    """How to reach one data plane of a prefill worker. `token` opens it once; `nonce` proves shared memory."""

    plane: str
    address: str = ""
    token: bytes = b""
    nonce: bytes = b""

    def __post_init__(self) -> None:
        check_size("plane", self.plane, MAX_NAME_CHARS)
        check_size("address", self.address, MAX_ADDRESS_CHARS)
        check_size("token", self.token, MAX_SECRET_NBYTES)
        check_size("nonce", self.nonce, MAX_SECRET_NBYTES)


@dataclass(frozen=True, slots=True)
class GroupRuns:
    """Ordinals of one layer group as (first, count) runs, ascending and apart."""

    group: int
    runs: Annotated[tuple[Run, ...], MAX_RUNS]

    def __post_init__(self) -> None:
        check_int("group", self.group, 0, MAX_GROUPS - 1)
        check_size("runs", self.runs, MAX_RUNS)
        end = 0
        for first, count in self.runs:
            if not (end <= first and count >= 1 and first + count <= MAX_ORDINAL):
                fail("runs", (first, count), f"ascending runs of at least one below {MAX_ORDINAL}")
            end = first + count

    @property
    def ordinals(self) -> tuple[int, ...]:
        return tuple(o for first, count in self.runs for o in range(first, first + count))


@dataclass(frozen=True, slots=True)
class UnitRun:
    """Consecutive units of one group. `slots` and `generations` are filled only where the receiver reads them (shm)."""

    group: int
    first: int
    count: int
    slots: Annotated[tuple[int, ...], MAX_SLICE_UNITS] = ()
    generations: Annotated[tuple[int, ...], MAX_SLICE_UNITS] = ()

    def __post_init__(self) -> None:
        check_int("group", self.group, 0, MAX_GROUPS - 1)
        check_int("first", self.first, 0, MAX_ORDINAL - 1)
        check_int("count", self.count, 1, MAX_SLICE_UNITS)
        check_int("first + count", self.first + self.count, 1, MAX_ORDINAL)
        if len(self.slots) != len(self.generations) or len(self.slots) not in (0, self.count):
            fail("slots", (len(self.slots), len(self.generations)), f"none, or {self.count} slots and generations")
        check_ints("slots", self.slots, 0, MAX_INT32)
        check_ints("generations", self.generations, 0, MAX_INT64)


@dataclass(frozen=True, slots=True)
class UnitName:
    """A unit in a failure report: never a flat block id."""

    group: int
    ordinal: int

    def __post_init__(self) -> None:
        check_int("group", self.group, 0, MAX_GROUPS - 1)
        check_int("ordinal", self.ordinal, 0, MAX_ORDINAL - 1)


def nameable(units: tuple[UnitName, ...]) -> tuple[UnitName, ...]:
    """What a report names of them: all, or none where that are too many."""
    return units if len(units) <= MAX_NAMED_UNITS else ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of the chosen token and of the most likely ones, most likely first."""

    logprob: float
    top: Annotated[tuple[tuple[int, float], ...], MAX_TOP] = ()

    def __post_init__(self) -> None:
        check_size("top", self.top, MAX_TOP)
        for token_id, _ in self.top:
            check_int("top", token_id, 0, MAX_INT32)
        for value in (self.logprob, *(value for _, value in self.top)):
            if not value < math.inf:  # NaN is not; minus infinity says that a token is impossible
                fail("logprob", value, "a number")


@dataclass(frozen=True, slots=True)
class SamplingState:
    """What sampling must carry across a transfer: the seed, and counts of generated tokens for penalties."""

    seed: int
    output_counts: Annotated[tuple[tuple[int, int], ...], MAX_COUNTED] = ()
    version: int = 1

    def __post_init__(self) -> None:
        check_count("seed", self.seed, -LARGEST_INT64 - 1, LARGEST_SEED)
        check_count("version", self.version, 1, MAX_TOKENS)
        check_size("output_counts", self.output_counts, MAX_COUNTED)
        for token_id, count in self.output_counts:
            check_count("output_counts: token id", token_id, 0, LARGEST_INT64)
            check_count("output_counts: count", count, 1, MAX_TOKENS)


@dataclass(frozen=True, slots=True)
class OtherFirst:
    """The first token of one more answer to the same prompt, from the same logits."""

    token_id: int
    logprobs: TokenLogprobs | None = None

    def __post_init__(self) -> None:
        check_count("token_id", self.token_id, 0, LARGEST_INT64)


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The token prefill sampled at position P, bound by rank 0's MAC to the KV it was computed from.

    `num_cached_tokens`: tokens of the prompt that were found in the cache and not computed. `others`: where several
    answers are given to the prompt, those of the second, the third and so on.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    state: SamplingState
    num_cached_tokens: int = 0
    others: Annotated[tuple[OtherFirst, ...], MAX_CHOICES] = ()

    def __post_init__(self) -> None:
        check_count("token_id", self.token_id, 0, LARGEST_INT64)
        check_size("others", self.others, MAX_CHOICES)
        check_count("num_cached_tokens", self.num_cached_tokens, 0, MAX_TOKENS)

    def of(self, choice: int) -> OtherFirst:
        """The first token of one of the answers."""
        return self.others[choice - 1] if choice else OtherFirst(self.token_id, self.logprobs)


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer ended: `stop` with the token that stopped it, or `length`."""

    reason: str
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens. Pure in (seed, position, logits): see `disagg.engine.sampler`.

    Every value within `sampling_limits` is legal and exact. `temperature` 0 is greedy, as is one below what float32
    divides by; `top_k` 0 and `top_p` 1.0 are off. `eos_token_ids` come from the model's generation config and count
    unless `ignore_eos`. `num_logprobs` None = no logprobs, 0 = only the chosen token's; `num_prompt_logprobs` likewise
    of the prompt's own tokens. `num_choices` answers are given to the prompt: see `of_choice`.
    `cache_salt`: KV is shared with requests of the same salt only.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[tuple[tuple[int, float], ...], MAX_BIASES] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    eos_token_ids: Annotated[tuple[int, ...], MAX_STOP_TOKEN_IDS] = ()
    stop_token_ids: Annotated[tuple[int, ...], MAX_STOP_TOKEN_IDS] = ()
    num_logprobs: int | None = None
    cache_salt: str = ""
    num_prompt_logprobs: int | None = None
    num_choices: int = 1

    def __post_init__(self) -> None:
        check_count("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        check_count("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        check_count("top_k", self.top_k, 0, LARGEST_INT64)
        check_count("seed", self.seed, -LARGEST_INT64 - 1, LARGEST_SEED)
        check_number("temperature", self.temperature, 0)
        check_above("top_p", self.top_p, 0, 1)
        check_number("min_p", self.min_p, 0, 1)
        check_above("repetition_penalty", self.repetition_penalty, 0)
        check_number("presence_penalty", self.presence_penalty, -LARGEST_LOGIT, LARGEST_LOGIT)
        check_number("frequency_penalty", self.frequency_penalty, -LARGEST_LOGIT, LARGEST_LOGIT)
        if self.num_logprobs is not None:
            check_count("num_logprobs", self.num_logprobs, 0, MAX_LOGPROBS)
        check_count("num_choices", self.num_choices, 1, MAX_CHOICES)
        if self.num_prompt_logprobs is not None:
            check_count("num_prompt_logprobs", self.num_prompt_logprobs, 0, MAX_LOGPROBS)
        self._check_ids()

    def of_choice(self, choice: int) -> Sampling:
        """What a request for this answer alone would ask for."""
        return replace(self, num_choices=1, seed=(self.seed + choice) & CHOICE_SEEDS) if choice else self

    def ending_after(self, token_id: int, num_output_tokens: int) -> Ending | None:
        """Whether `token_id`, as the last of so many output tokens, ends the answer. No stop before `min_tokens`."""
        stops = self.stop_token_ids
        if not self.ignore_eos:
            stops += self.eos_token_ids
        if token_id in stops and num_output_tokens >= self.min_tokens:
            return Ending("stop", token_id)
        return Ending("length") if num_output_tokens >= self.max_tokens else None

    def _check_ids(self) -> None:
        check_ids("logit_bias", [entry[0] for entry in self.logit_bias], MAX_BIASES)
        for bias in (number for entry in self.logit_bias for number in entry[1:]):  # the codec checks that it is a pair
            check_number("logit_bias", bias, -LARGEST_LOGIT, LARGEST_LOGIT)
        check_ids("eos_token_ids", self.eos_token_ids, MAX_STOP_TOKEN_IDS)
        check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)


@dataclass(frozen=True, slots=True)
class MetricSample:
    """One figure of a worker's metrics as its lease carries it. `kind` is `gauge` or `counter`."""

    name: str
    kind: str
    labels: Annotated[tuple[tuple[str, str], ...], MAX_LABELS]
    value: float

    def __post_init__(self) -> None:
        check_size("name", self.name, MAX_NAME_CHARS)
        check_size("kind", self.kind, MAX_NAME_CHARS)
        check_size("labels", self.labels, MAX_LABELS)
        for name, value in self.labels:
            check_size("labels", name, MAX_NAME_CHARS)
            check_size("labels", value, MAX_ADDRESS_CHARS)


@dataclass(frozen=True, slots=True)
class GroupBytes:
    """What one layer group cost in a transfer. `full_copy_*` = all layers of the group, every block of the prompt."""

    group: int
    name: str
    num_blocks: int
    nbytes: int
    full_copy_blocks: int
    full_copy_nbytes: int

    def __post_init__(self) -> None:
        check_int("group", self.group, 0, MAX_GROUPS - 1)
        check_size("name", self.name, MAX_NAME_CHARS)
        for name in ("num_blocks", "nbytes", "full_copy_blocks", "full_copy_nbytes"):
            check_int(name, getattr(self, name), 0, MAX_INT64)


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds a worker spent on one request, on its own clock, by stage name such as `queue`, `prefill`, `wire`."""

    stages: Annotated[tuple[tuple[str, float], ...], MAX_LABELS] = field(default=())

    def __post_init__(self) -> None:
        check_size("stages", self.stages, MAX_LABELS)
        check_names("stages", (name for name, _ in self.stages))
