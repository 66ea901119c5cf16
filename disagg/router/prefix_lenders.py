"""Where a prompt's blocks may be had: the router's choice of a source, and what it learns of each.

A way that the cost function chose with a source is taken as it is. Policies that ask no index go by the router's own
memory of what it gave to which worker.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from disagg.cache.identity import BlockHasher
from disagg.router.back_off import BackOff
from disagg.router.choose import Placement
from disagg.router.generation import GenerationRequest
from disagg.router.prefix_legs import PrefixSource
from disagg.router.prefix_memory import PrefixMemory, Remembered
from disagg.router.record import RequestRecord
from disagg.router.registry import Registry, Worker, WorkerState
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.purposes import PREFIX

BLOCKS_PER_NAME: Final = 4
"""Of the coarsest block size: 128 names of a prompt of 8,192 tokens in blocks of 16, a third of a millisecond."""

MAX_NAMED_TOKENS: Final = 16384
"""Of a prompt that is remembered: its names are made on the router's loop, where more would take over half a
millisecond. Prompts that differ further on only are taken for one, and a source says what it has."""

MAX_LEGS: Final = 4096
"""Legs whose outcome may still be told: as many as there are requests under way."""

_USABLE: Final = ("ready", "idle")


class PrefixLenders:
    """Of one router. Event loop only. `remembers`: whether its own memory is asked."""

    def __init__(self, registry: Registry, hash_key: bytes, clock: Callable[[], float], *, remembers: bool) -> None:
        self._registry, self._hash_key, self._clock, self._remembers = registry, hash_key, clock, remembers
        self._coarsest = 0
        self._memory, self._back_off = PrefixMemory(), BackOff()
        self._legs: OrderedDict[str, tuple[str, tuple[bytes, ...], str]] = OrderedDict()
        """By leg: its source, the names of its prompt, and the transfer id of its request."""
        self._hasher: BlockHasher | None = None
        self._fingerprint = ""

    def choose(self, request: GenerationRequest, sink: PeerTarget, placement: Placement) -> PrefixSource | None:
        """A worker that should have more of the prompt than `sink`, which will compute it."""
        worker = self._registry.get(sink.incarnation)
        if worker is None or PREFIX not in worker.receives or request.sampling.num_prompt_logprobs is not None:
            return None
        source = self._named_by(placement, worker) or self._remembered(request, worker)
        return None if source is None else self._source(request, worker, source)

    def add(self, worker: Worker) -> None:
        self._coarsest = max(self._coarsest, worker.register.geometry.block_size)

    def note_leg(self, leg: str, source: str, request: GenerationRequest, transfer_id: str) -> None:
        """The outcome of this leg may be told later."""
        self._legs[leg] = source, self._chain(request), transfer_id
        if len(self._legs) > MAX_LEGS:
            self._legs.popitem(last=False)

    def note_served(self, request: GenerationRequest, record: RequestRecord) -> None:
        """The request was answered; of several answers the longest may have been as long as all together."""
        chain, size, placement = self._chain(request), len(request.prompt), record.current.placement
        if chain:
            self._memory.note(placement.server.incarnation, chain, size + max(0, record.num_tokens - 1))
            if placement.prefill is not None:
                self._memory.note(placement.prefill.incarnation, chain, size)

    def note_failed(self, leg: str) -> bool:
        """A sink got nothing of this leg. False for one that is not known."""
        if (found := self._legs.pop(leg, None)) is None:
            return False
        source, chain, _ = found
        self._back_off.failed(source, self._clock())
        self._memory.drop(source, chain)
        return True

    def note_fetched(self, transfer_id: str) -> None:
        """A sink reports that the prefix of this request has come."""
        for leg in reversed(self._legs):
            if self._legs[leg][2] == transfer_id:
                self._back_off.succeeded(self._legs.pop(leg)[0])
                return

    def forget(self, incarnation: str) -> None:
        self._back_off.forget(incarnation)

    # --- how it is done ---------------------------------------------------------------------------------------

    def _named_by(self, placement: Placement, sink: Worker) -> Worker | None:
        """The source that the chosen way was estimated with."""
        named = placement.way.start.source if placement.way is not None else None
        source = self._registry.get(named) if named is not None else None
        return source if source is not None and self._may_lend(source, sink) else None

    def _remembered(self, request: GenerationRequest, sink: Worker) -> Worker | None:
        step = BLOCKS_PER_NAME * self._coarsest
        found = self._memory.holders(self._chain(request), step)
        own = max((one.num_tokens for one in found if one.incarnation == sink.incarnation), default=0)
        least = own + step // BLOCKS_PER_NAME  # a block more at the least
        more = [one for one in found if one.num_tokens >= least]
        for one in sorted(more, key=_most_first):
            source = self._registry.get(one.incarnation)
            if source is not None and source is not sink and self._may_lend(source, sink):
                return source
        return None

    def _may_lend(self, source: Worker, sink: Worker) -> bool:
        now, ours, theirs = self._clock(), source.register.geometry, sink.register.geometry
        is_alike = (ours.kv_dtype, ours.kv_scales) == (theirs.kv_dtype, theirs.kv_scales)
        is_linked = sink.link_state(source.incarnation) in _USABLE and source.state(now) is not WorkerState.SUSPECT
        return PREFIX in source.sends and is_alike and is_linked and self._back_off.may_ask(source.incarnation, now)

    def _source(self, request: GenerationRequest, sink: Worker, source: Worker) -> PrefixSource | None:
        size, other = source.register.geometry.block_size, sink.register.geometry.block_size
        coarser = max(size, other)
        boundary = (len(request.prompt) - 1) // coarser * coarser
        if not boundary or coarser % min(size, other):
            return None
        names = self._made_hasher(source).chain(request.prompt[:boundary], size, request.sampling.cache_salt)
        return PrefixSource(source.target, boundary, names[-1])

    def _chain(self, request: GenerationRequest) -> tuple[bytes, ...]:
        worker, step = next(iter(self._registry), None), BLOCKS_PER_NAME * self._coarsest
        if worker is None or not step or not self._remembers:
            return ()
        named = request.prompt[:MAX_NAMED_TOKENS]
        return self._made_hasher(worker).chain(named, step, request.sampling.cache_salt)

    def _made_hasher(self, worker: Worker) -> BlockHasher:
        """Of the fleet's one model."""
        fingerprint = worker.register.identity.model_fingerprint
        if self._hasher is None or fingerprint != self._fingerprint:
            self._hasher, self._fingerprint = BlockHasher(self._hash_key, fingerprint), fingerprint
        return self._hasher


def _most_first(one: Remembered) -> int:
    return -one.num_tokens
