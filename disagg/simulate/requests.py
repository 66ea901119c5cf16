"""One request on its way through the simulated cluster, and what a worker has to do for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from disagg.cache.admission import Peaks
from disagg.simulate.blocks import Holding
from disagg.simulate.geometry import Runs
from disagg.simulate.trace import TracedRequest


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """Moments in seconds of the simulated clock, counts of tokens and bytes; None = has not happened."""

    number: int
    traced: TracedRequest
    server: int | None = None
    prefill: int | None = None
    source: int | None = None
    """The worker that a prefix came from."""
    placed_at: float | None = None
    estimate_s: float = 0.0
    """Of the time from placing to the first token; 0 where the policy makes none."""
    computed_at: float | None = None
    first_at: float | None = None
    ended_at: float | None = None
    refused: str = ""
    num_cached: int = 0
    """Prompt tokens that were not computed: found where the prompt was computed, or fetched to there."""
    num_fetched: int = 0
    """Of these, tokens that another worker sent."""
    handoff_nbytes: tuple[int, ...] = ()
    """Per group."""
    prefix_nbytes: tuple[int, ...] = ()
    num_drops: int = 0
    """Times that its prompt gave way to others and was computed anew."""


class PromptStage(Enum):
    """Of a prompt at one worker."""

    WAITING = auto()
    COMPUTING = auto()
    COMPUTED = auto()
    PARKED = auto()
    """It gave way, and waits for its decode worker."""


@dataclass(slots=True, eq=False)
class PromptWork:
    """A prompt to compute. `serves`: its answer is generated here too, else its KV is handed over.

    `is_soft`: its decode worker has not asked for it yet, so it gives way to others. `peaks`: slots that it is promised
    until it is computed, `kept`: from then on. `on_computed` is told of the end of computing.
    """

    request: SimulatedRequest
    peaks: Peaks
    kept: Peaks
    serves: bool
    is_soft: bool
    on_computed: Callable[[PromptWork], None] = field(default=lambda _: None)
    stage: PromptStage = PromptStage.WAITING
    held: Holding | None = None
    reused: int = 0
    """Blocks of the trace that computing began from."""
    remaining: int = 0
    chunk_begun: int = 0
    """The token that the last chunk began at."""
    first_chunk_at: float = 0.0
    """When the first chunk was computed."""

    @property
    def computed(self) -> int:
        return self.request.traced.prompt_len - self.remaining


@dataclass(slots=True, eq=False)
class ReservationWork:
    """Room for a prompt that will be received. `on_reserved` is told what is there of it, per group."""

    request: SimulatedRequest
    peaks: Peaks
    on_reserved: Callable[[ReservationWork], None]
    held: Holding | None = None
    resident: tuple[Runs, ...] = ()


@dataclass(slots=True, eq=False)
class AnswerWork:
    """An answer being generated. `left`: tokens still to come when it joins the steps of its worker."""

    request: SimulatedRequest
    held: Holding
    left: int
    first_at: float | None = None
    """When the client had its first token."""


@dataclass(slots=True)
class StepsDone:
    """Equal steps of one worker: `count` of them, each with a token for `num_answers` answers.

    `joined`: answers whose first step here was the first of these. `ended`: those whose last step was the last.
    `first_tokens`: requests whose prompt the step ended, served here.
    """

    worker: int
    begun_at: float
    count: int
    num_answers: int
    joined: list[AnswerWork] = field(default_factory=list)
    ended: list[AnswerWork] = field(default_factory=list)
    first_tokens: list[AnswerWork] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return self.count * self.num_answers + len(self.first_tokens)
