"""Which worker holds which blocks, per layer group. Pure: events of workers in, holders of a chain out.

One integer for each known block says which workers hold it: worker number x groups + group is the bit. So a block that
a hundred workers hold costs one entry, and a chain is looked up once, whatever the number of workers. What a worker
told goes with it: its bits count no more at once, and are cleared a few blocks at a time before its number is used
again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from disagg.router.index.sliding import SlidingAnd
from disagg.transceiver.wire.messages.blocks import (
    BLOCK_NAME_NBYTES,
    DROPPED,
    NUM_KINDS,
    BlockEvents,
)

SWEPT_AT_ONCE: Final = 20_000
"""Blocks looked at for bits of workers that are gone: 4 ms, which a question may wait."""


@dataclass(frozen=True, slots=True)
class GroupSpan:
    """What a layer group attends to: `window` tokens, None = all, and the first `num_sink_tokens`."""

    window: int | None
    num_sink_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Holder:
    """`incarnation` could go on from the first `num_tokens` tokens of the prompt."""

    incarnation: str
    num_tokens: int


@dataclass(slots=True)
class _Teller:
    """A registered worker. `expected`: the sequence number of its next message; None = a reset must come first."""

    block_size: int
    number: int
    expected: int | None = field(default=None)


class BlockIndex:
    """`add` and `remove` workers, `take` their events, ask `holders` of a chain."""

    def __init__(self, groups: Sequence[GroupSpan]) -> None:
        """`groups`: the model's layer groups, by the numbers that events have."""
        if not groups:
            raise ValueError("groups: none, expected at least one")
        self.groups = tuple(groups)
        self._bits: dict[bytes, int] = {}
        self._tellers: dict[str, _Teller] = {}
        self._numbered: dict[int, tuple[dict[int, str], int]] = {}
        """By block size, until a worker comes or goes: incarnations by their bit, and all bits together."""
        self._free: list[int] = []
        self._num_numbers = 0
        self._dead = 0
        """Bits of numbers whose worker is gone, or told that it begins anew."""
        self._dying: list[int] = []
        self._unswept: list[bytes] = []
        self._sweeping: list[int] = []

    def __len__(self) -> int:
        """Blocks known, of any worker."""
        return len(self._bits)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Of the workers, each once."""
        return tuple(sorted({teller.block_size for teller in self._tellers.values()}))

    def add(self, incarnation: str, block_size: int) -> None:
        """A worker registered. It holds nothing before its first reset."""
        self.remove(incarnation)
        self._tellers[incarnation] = _Teller(block_size, self._take_number())

    def follows(self, incarnation: str) -> bool:
        """Whether all that this worker told is known here: it began, and nothing was missed since."""
        teller = self._tellers.get(incarnation)
        return teller is not None and teller.expected is not None

    def remove(self, incarnation: str) -> None:
        """A worker is gone, with all that it told. One that is not known is no error."""
        if (teller := self._tellers.pop(incarnation, None)) is not None:
            self._retire(teller.number)

    def take(self, events: BlockEvents) -> bool:
        """Apply one message. False where one before it was missed: the whole set must be asked for.

        From there on this worker holds nothing here, and its messages are passed over, until it begins anew. One that
        names groups or blocks that its model does not have is passed over for good.
        """
        teller = self._tellers.get(events.incarnation)
        if teller is None:
            return True
        if not self._fits(events, teller):
            self.remove(events.incarnation)
            return True
        if events.is_reset:
            self._retire(teller.number)
            teller.number = self._take_number()
        elif teller.expected is None:
            return True
        elif events.sequence != teller.expected:
            self._retire(teller.number)
            teller.number, teller.expected = self._take_number(), None
            return False
        teller.expected = events.sequence + 1
        self._apply(events, teller.number * len(self.groups))
        return True

    def holders(self, chain: Iterable[bytes], block_size: int, most: int) -> list[Holder]:
        """Workers of this block size that could go on behind some block of `chain`, those with the most tokens first.

        `chain`: the identities of a prompt's blocks. It is read as far as any worker holds it. A worker could go on
        from a boundary where every group holds each block that a later query attends to.
        """
        here, unseen = self._workers_of(block_size)
        found: list[Holder] = []
        for count, able in reversed(list(enumerate(self._able(chain, block_size, unseen), 1))):
            new = able & unseen
            while new and len(found) < most:
                bit = new & -new
                found.append(Holder(here[bit], count * block_size))
                new, unseen = new ^ bit, unseen ^ bit
            if len(found) == most or not unseen:
                break
        return found

    def sweep(self) -> bool:
        """Clear bits of workers that are gone from some blocks. Whether there is more to do."""
        if not self._unswept:
            if not self._dying:
                return False
            self._sweeping, self._dying = self._dying, []
            self._unswept = list(self._bits)
        some, self._unswept = self._unswept[-SWEPT_AT_ONCE:], self._unswept[:-SWEPT_AT_ONCE]
        self._clear(some, ~sum(self._mask(number) for number in self._sweeping))
        if not self._unswept:
            for number in self._sweeping:
                self._dead &= ~self._mask(number)
            self._free += self._sweeping
            self._sweeping = []
        return bool(self._unswept or self._dying)

    def check_invariants(self) -> None:
        """Numbers belong to one worker each, or to none; no block is known without a holder."""
        numbers = [teller.number for teller in self._tellers.values()]
        assert sorted([*numbers, *self._free, *self._dying, *self._sweeping]) == list(range(self._num_numbers))
        living = sum(map(self._mask, numbers))
        assert not living & self._dead
        assert all(self._bits.values())
        kept = dict(self._numbered)
        self._numbered.clear()
        assert all(self._workers_of(size) == known for size, known in kept.items()), "a worker came or went unseen"
        assert not any(bits & ~(living | self._dead) for bits in self._bits.values())

    def _fits(self, events: BlockEvents, teller: _Teller) -> bool:
        numbers = [group for groups in events.group_sets for group in groups]
        return events.block_size == teller.block_size and max(numbers, default=0) < len(self.groups)

    def _apply(self, events: BlockEvents, shift: int) -> None:
        masks = [sum(1 << shift + group for group in groups) for groups in events.group_sets]
        names, bits = events.identities, self._bits
        known = bits.get
        for start, op in zip(range(0, len(names), BLOCK_NAME_NBYTES), events.ops, strict=True):
            name, mask = names[start : start + BLOCK_NAME_NBYTES], masks[op // NUM_KINDS]
            if op % NUM_KINDS != DROPPED:
                bits[name] = known(name, 0) | mask
            elif left := known(name, 0) & ~mask:
                bits[name] = left
            else:
                bits.pop(name, None)

    def _able(self, chain: Iterable[bytes], block_size: int, everyone: int) -> Iterable[int]:
        """Behind each block of `chain`, the workers that could go on there: one bit each, that of their first group."""
        spans = [_Span(group, block_size) for group in self.groups]
        for identity in chain:
            bits = self._bits.get(identity, 0) & ~self._dead
            able = everyone
            for number, span in enumerate(spans):
                able &= span.step(bits >> number & everyone)
            if any(span.is_over for span in spans):
                return
            yield able

    def _workers_of(self, block_size: int) -> tuple[dict[int, str], int]:
        if (known := self._numbered.get(block_size)) is None:
            some = ((name, teller) for name, teller in self._tellers.items() if teller.block_size == block_size)
            here = {1 << teller.number * len(self.groups): name for name, teller in some}
            known = self._numbered[block_size] = here, sum(here)
        return known

    def _clear(self, names: Iterable[bytes], mask: int) -> None:
        for name in names:
            if (bits := self._bits.get(name)) is not None and (left := bits & mask) != bits:
                if left:
                    self._bits[name] = left
                else:
                    del self._bits[name]

    def _mask(self, number: int) -> int:
        return ((1 << len(self.groups)) - 1) << number * len(self.groups)

    def _take_number(self) -> int:
        self._numbered.clear()
        if self._free:
            return self._free.pop()
        self._num_numbers += 1
        return self._num_numbers - 1

    def _retire(self, number: int) -> None:
        self._numbered.clear()
        self._dead |= self._mask(number)
        self._dying.append(number)


class _Span:
    """One group along a chain: which workers hold all that is attended to behind the block reached."""

    __slots__ = ("_block_size", "_every", "_num_blocks", "_num_sink_blocks", "_recent", "_sinks", "_window", "is_full")

    def __init__(self, group: GroupSpan, block_size: int) -> None:
        self.is_full, self._window, self._block_size = group.window is None, group.window or 0, block_size
        self._num_sink_blocks = -(-group.num_sink_tokens // block_size)
        self._every = self._sinks = -1
        self._recent, self._num_blocks = SlidingAnd(), 0

    def step(self, holding: int) -> int:
        """The next block is held by these workers. Those that hold all that is needed behind it."""
        self._num_blocks += 1
        if self.is_full:
            self._every &= holding
            return self._every
        if self._num_blocks <= self._num_sink_blocks:
            self._sinks &= holding
        self._recent.push(holding)
        oldest = (self._num_blocks * self._block_size + 1 - self._window) // self._block_size
        self._recent.drop_before(max(oldest, min(self._num_sink_blocks, self._num_blocks)))
        return self._sinks & self._recent.value

    @property
    def is_over(self) -> bool:
        """No worker holds the chain as far as this, and so none will further on."""
        return self._every == 0
