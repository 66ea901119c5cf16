"""Engines on tiny caches, and the shortest possible transfer: a copy of the needed blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from support.model.fake_runner import FakeRunner
from support.model.late_device import LateDevice
from support.oracles.cache_oracle import needed_blocks, tiny_layout

from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout
from disagg.engine.commands import (
    AttemptKey,
    Command,
    EngineEvent,
    FailedEvent,
    FinishedEvent,
    PromptComputedEvent,
    ReservedEvent,
    SoftDroppedEvent,
    TokensEvent,
    UnitsFinalEvent,
)
from disagg.engine.engine import Engine, EngineConfig
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.wire.messages.values import Sampling

LAYOUT = tiny_layout(6, 6, None, 11, block_size=4, num_sink_tokens=3, max_model_len=200)
"""Two windowed groups with sinks and a full one; the first has two layers and so a pool of its own."""

ROOM = (60, 120)

HASHER = BlockHasher(b"key", "model")
"""Given to an engine, prefixes are reused."""


def key(number: int, epoch: int = 1) -> AttemptKey:
    return AttemptKey(f"{number:032x}", epoch)


def greedy(max_tokens: int, **others: object) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, **others)  # type: ignore[arg-type]


def prompt_of(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple((7 * i * i + 3 * i + 11 * salt) % 40 for i in range(length))


class TestedEngine(Engine):
    """An engine that checks its invariants after every change and keeps all events it gave."""

    __test__ = False

    def __init__(
        self,
        *,
        layout: CacheLayout = LAYOUT,
        num_slots: Sequence[int] = ROOM,
        role: str = "both",
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        max_model_len: int = 200,
        poison: int | None = None,
        swa_scratch: str = "off",
        hasher: BlockHasher | None = None,
        prefix_recheck_s: float | None = None,
        steps_ahead: int | None = None,
    ) -> None:
        """With `steps_ahead` the steps run on a `LateDevice`, one ahead or none."""
        layout = replace(layout, uses_scratch=swa_scratch != "off")
        self.cache = KVCache(layout, num_slots, hasher=hasher)
        self.runner = FakeRunner(self.cache, poison)
        self.events: list[EngineEvent] = []
        self.bytes_when_final: dict[SourceUnit, bytes] = {}
        self.events_of: defaultdict[AttemptKey, list[EngineEvent]] = defaultdict(list)
        limits = (max_num_seqs, max_num_batched_tokens, max_model_len)
        config = EngineConfig(role, *limits, True, 40, swa_scratch, prefix_recheck_s, steps_ahead or 0)
        if steps_ahead is None:
            super().__init__(self.runner, self.cache, config)
            return
        self.device = LateDevice(self.runner, self.cache)
        super().__init__(self.device, self.cache, config, draw=self.device.draw)

    def handle(self, command: Command) -> list[EngineEvent]:
        return self._keep(super().handle(command))

    def step(self) -> list[EngineEvent]:
        return self._keep(super().step())

    def _keep(self, events: list[EngineEvent]) -> list[EngineEvent]:
        self.events += events
        for event in events:
            self.events_of[event.key].append(event)
            if isinstance(event, UnitsFinalEvent):
                self.bytes_when_final |= {unit: self.bytes_of(unit) for unit in event.units}
        return events

    def bytes_of(self, unit: SourceUnit) -> bytes:
        return self.cache.group_view(unit.group)[unit.slot].numpy().tobytes()

    def run(self) -> list[EngineEvent]:
        """Step until there is nothing to compute."""
        seen = len(self.events)
        while self.has_work:
            self.step()
        return self.events[seen:]

    def serve_all(self, commands: Iterable[Command]) -> None:
        for command in commands:
            self.handle(command)
        self.run()

    def of(self, wanted: AttemptKey, kind: type | tuple[type, ...] = object) -> list[EngineEvent]:
        return [event for event in self.events_of[wanted] if isinstance(event, kind)]

    def tokens(self, wanted: AttemptKey) -> list[int]:
        """Tokens of an answer, checked to be numbered without gap or repeat."""
        tokens: list[int] = []
        for event in self.of(wanted, TokensEvent):
            assert isinstance(event, TokensEvent)
            assert event.index == len(tokens)
            tokens += event.token_ids
        return tokens

    def ending(self, wanted: AttemptKey) -> FinishedEvent | FailedEvent:
        (event,) = self.of(wanted, (FinishedEvent, FailedEvent))
        assert isinstance(event, FinishedEvent | FailedEvent)
        return event

    @property
    def num_used(self) -> int:
        return self.stats().num_used_slots

    def final_units(self, wanted: AttemptKey, compute_id: int) -> list[SourceUnit]:
        events = [e for e in self.of(wanted, UnitsFinalEvent) if isinstance(e, UnitsFinalEvent)]
        return [unit for event in events if event.compute_id == compute_id for unit in event.units]

    def computed(self, wanted: AttemptKey) -> PromptComputedEvent | None:
        """The word that the prompt is whole, unless its blocks were dropped since."""
        events = self.of(wanted, (PromptComputedEvent, SoftDroppedEvent))
        return events[-1] if events and isinstance(events[-1], PromptComputedEvent) else None

    def reserved(self, wanted: AttemptKey) -> ReservedEvent | None:
        events = self.of(wanted, ReservedEvent)
        return events[-1] if events else None  # type: ignore[return-value]


def transfer(source: TestedEngine, target: TestedEngine, wanted: AttemptKey, prompt_len: int) -> Verified:
    """Copy exactly the blocks that the target waits for, from where the source announced them.

    Together with those it holds they are what the oracle needs; without a prefix cache it holds none.
    """
    computed, reserved = source.computed(wanted), target.reserved(wanted)
    assert computed is not None
    assert reserved is not None
    units = {(unit.group, unit.ordinal): unit for unit in source.final_units(wanted, computed.compute_id)}
    for number, group in enumerate(source.cache.layout.groups):
        needed = needed_blocks(prompt_len, group.window, group.num_sink_tokens, source.cache.layout.block_size)
        listed = [ordinal for ordinal, _ in reserved.slots[number]]
        assert listed == [ordinal for ordinal in needed if ordinal in listed]
        assert listed == needed or target.stats().reuse
        announced = {ordinal: units.pop((number, ordinal)) for ordinal in needed}
        for ordinal, slot in reserved.slots[number]:
            unit = announced[ordinal]
            pool = source.cache.layout.pool_of_group[number]
            assert source.cache.pools[pool].generations[unit.slot] == unit.generation
            assert source.bytes_of(unit) == source.bytes_when_final[unit], "a final block was written to"
            target.cache.group_view(number)[slot] = source.cache.group_view(number)[unit.slot]
    assert not units, "a unit was announced that nobody needs"
    return Verified(wanted.transfer_id, wanted.epoch, computed.first_token)
