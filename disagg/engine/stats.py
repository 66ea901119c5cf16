"""What the engine has done and holds: one record that metrics, leases and tests read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from disagg.cache.cache import PoolUsage
from disagg.cache.prefix_cache import ReuseCount
from disagg.engine.commands import AttemptKey
from disagg.engine.run.graphs.use import GraphUse


@dataclass(slots=True)
class EngineCounters:
    """Counters since start, and the most scratch slots of a step; only the engine's own thread writes them."""

    scratch: tuple[int, ...]
    steps: int = 0
    prompt_tokens_computed: int = 0
    tokens_generated: int = 0
    answer_tokens: int = 0
    dropped: int = 0
    released: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Figures at one moment, between two steps.

    `pools`: slots used, free and peak per pool; used = held by a live sequence or reservation.
    `num_running`: sequences that the next step may compute (prompts and answers); `num_waiting`: requests that hold
    nothing yet; `num_soft`: prompts computed ahead of their FETCH that hold blocks; `num_held`: computed prompts whose
    blocks wait for the decode worker; `num_reserved`: reservations whose KV has not arrived.
    `prompt_tokens_computed`, `tokens_generated` (sampled here), `answer_tokens` (of these, the ones after an answer's
    first), `steps`: counters. `live_keys`: not yet released.
    `released`: attempts that a command ended, by the state it found them in (see `state_of`); for a `held` prompt that
    is the usual end, for all others a cancel or a failure.
    `num_preemptions`: sequences whose blocks were taken for older ones, since start.
    `scratch`: per pool, the most slots that were scratch during one step, since start; none is between steps.
    `num_dropped`: pieces of steps that were computed for sequences which had ended, or lost their blocks, before the
    result was read; 0 where no step runs ahead.
    `graphs`: captured graphs; all 0 where steps run eager.
    `reuse`: per layer group, blocks that requests asked the prefix cache for and found; empty without one.
    `num_outdated`: per layer group, blocks that running sequences let go because their window moved past them.
    """

    pools: tuple[PoolUsage, ...]
    num_running: int
    num_waiting: int
    num_soft: int
    num_held: int
    num_reserved: int
    prompt_tokens_computed: int
    tokens_generated: int
    steps: int
    live_keys: tuple[AttemptKey, ...]
    released: tuple[tuple[str, int], ...] = ()
    reuse: tuple[ReuseCount, ...] = ()
    num_outdated: tuple[int, ...] = ()
    num_preemptions: int = 0
    scratch: tuple[int, ...] = ()
    graphs: GraphUse = field(default_factory=GraphUse)
    num_dropped: int = 0
    answer_tokens: int = 0
    has_floor: bool = False
    """Whether the pools keep room for what other workers fetch (see `disagg.engine.scheduler`)."""

    @property
    def num_used_slots(self) -> int:
        return sum(pool.num_used for pool in self.pools)
