"""May this sequence start, and may it grow? Only when every pool can promise what it will hold, so no step fails."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from operator import add, sub

from disagg.cache.layout import CacheLayout
from disagg.cache.pool import NUM_RESERVED_SLOTS
from disagg.cache.scratch import num_scratch_slots
from disagg.cache.window import live_slots_bound, num_live, sink_blocks

Peaks = tuple[int, ...]
"""Slots per pool."""


def peak_slots(layout: CacheLayout, *, total_tokens: int, history: int, step_tokens: int) -> Peaks:
    """Most slots per pool that a sequence holds from `history` tokens on until it has `total_tokens`.

    `step_tokens`: the most tokens that one step adds (1 in decode, the chunk in prefill). A full group holds every
    block; a windowed one its bound during such a step, and never a block that is already stale at `history`.
    """
    assert 0 <= history <= total_tokens
    assert step_tokens >= 1
    peaks = [0] * layout.num_pools
    for group, pool in enumerate(layout.pool_of_group):
        peaks[pool] += group_peak_slots(layout, group, total_tokens, history, step_tokens)
    return tuple(peaks)


def group_peak_slots(layout: CacheLayout, number: int, total_tokens: int, history: int, step_tokens: int) -> int:
    """`peak_slots` of group `number` alone, scratch slots included."""
    group, size = layout.groups[number], layout.block_size
    if group.window is None:
        return layout.num_blocks(total_tokens)
    bound = live_slots_bound(group.window, group.num_sink_tokens, size, step_tokens)
    if pages := layout.scratch_pages(number):
        bound = min(bound, _scratch_bound(group.window, group.num_sink_tokens, size, step_tokens, pages))
    return min(bound, num_live(total_tokens, history, group.window, group.num_sink_tokens, size))


def _scratch_bound(window: int, num_sink_tokens: int, block_size: int, step_tokens: int, pages: int) -> int:
    """Most slots during a step with scratch: live blocks of its start, those of its end, and the scratch slots.

    Blocks below the start are live for the W-1 tokens before it: at most floor((W+T-3)/T) + 1. At the end `reuse` keeps
    what is read from the block boundary before it on: floor((W+T-2)/T) + 1, which is one more than the end itself needs
    where W = 2 (mod T), and then promised to a step that keeps nothing too. Of n tokens floor((n+1-W)/T) blocks can
    both begin and go stale in the step.
    """
    at_start = (window + block_size - 3) // block_size + 1
    at_end = (window + block_size - 2) // block_size + 1
    num_scratch = max(0, (step_tokens + 1 - window) // block_size)
    sinks = sink_blocks(num_sink_tokens, block_size)
    return at_start + at_end + sinks + num_scratch_slots(num_scratch, pages)


class Promises:
    """Slots promised per pool. The sum of all promises never exceeds a pool, so a promised slot can always be taken.

    A soft sequence's promise is revocable: a caller that may not wait for it releases it and drops the sequence.
    A `floor` is what promises that are not *exempt* leave free, so that exempt ones never wait for them.
    """

    def __init__(self, num_slots: Sequence[int]) -> None:
        """`num_slots[p]` as in `KVCache`: the two reserved ones included."""
        self.usable: Peaks = tuple(count - NUM_RESERVED_SLOTS for count in num_slots)
        self.promised: Peaks = (0,) * len(num_slots)
        """Sum of all promises."""
        self.floor: Peaks = (0,) * len(num_slots)
        self._bounded: Peaks = (0,) * len(num_slots)
        """Sum of the promises that are not exempt."""
        self._peaks: dict[Hashable, Peaks] = {}
        self._exempt: set[Hashable] = set()

    @property
    def has_floor(self) -> bool:
        return any(self.floor)

    @property
    def free(self) -> Peaks:
        """Slots that may be promised to one that is not exempt."""
        free, above = map(sub, self.usable, self.promised), map(sub, map(sub, self.usable, self.floor), self._bounded)
        return tuple(map(min, free, above))

    def keep_floor(self, peaks: Peaks) -> None:
        """Keep so many for what is exempt, unless as many again could not be promised beside them."""
        if all(2 * peak <= usable for peak, usable in zip(peaks, self.usable, strict=True)):
            self.floor = peaks

    def fits_empty(self, peaks: Peaks) -> bool:
        """Whether the peaks fit in empty pools above the floor: if not, waiting is pointless."""
        return _fit(peaks, self.floor, self.usable)

    def fits_floor(self, peaks: Peaks) -> bool:
        """Whether the peaks of one more exempt sequence fit in the floor, beside those that there are."""
        return _fit(peaks, tuple(map(sub, self.promised, self._bounded)), self.floor)

    def fits(self, peaks: Peaks, *, without: Collection[Hashable] = (), is_exempt: bool = False) -> bool:
        """Whether `peaks` could be promised now, or after the promises of `without` were released."""
        taken, bounded = self.promised, self._bounded
        for key in without:
            if (held := self._peaks.get(key)) is not None:
                taken = tuple(map(sub, taken, held))
                bounded = bounded if key in self._exempt else tuple(map(sub, bounded, held))
        if not _fit(peaks, taken, self.usable):
            return False
        return is_exempt or not self.has_floor or _fit(peaks, tuple(map(add, bounded, self.floor)), self.usable)

    def try_promise(self, key: Hashable, peaks: Peaks, *, is_exempt: bool = False) -> bool:
        """Promise `peaks` to `key`, in every pool or in none."""
        assert key not in self._peaks, f"{key} holds a promise already"
        if not self.fits(peaks, is_exempt=is_exempt):
            return False
        self._exempt |= {key} if is_exempt else set()
        self._set(key, peaks)
        return True

    def try_grow(self, key: Hashable, peaks: Peaks) -> bool:
        """Raise the promise to `key` to at least `peaks`, in every pool or in none."""
        held = self._peaks[key]
        wanted = tuple(map(max, held, peaks))
        if wanted == held:  # windows let go of as many blocks as they begin
            return True
        if not self.fits(wanted, without=(key,), is_exempt=key in self._exempt):
            return False
        self._set(key, wanted)
        return True

    def shrink(self, key: Hashable, peaks: Peaks) -> None:
        """Give back what `key` will not need any more; no pool's promise grows."""
        self._set(key, tuple(map(min, self._peaks[key], peaks)))

    def of(self, key: Hashable) -> Peaks | None:
        return self._peaks.get(key)

    def release(self, key: Hashable) -> None:
        """Forget the promise of `key`; without one, nothing happens."""
        self._set(key, None)
        self._exempt.discard(key)

    def check_invariants(self) -> None:
        sums = tuple(sum(peaks[pool] for peaks in self._peaks.values()) for pool in range(len(self.usable)))
        assert sums == self.promised, "the promises are miscounted"
        others = [peaks for key, peaks in self._peaks.items() if key not in self._exempt]
        assert tuple(sum(peaks[pool] for peaks in others) for pool in range(len(self.usable))) == self._bounded
        assert self._exempt <= self._peaks.keys()
        assert all(promised <= usable for promised, usable in zip(self.promised, self.usable, strict=True))

    def _set(self, key: Hashable, peaks: Peaks | None) -> None:
        is_bounded = key not in self._exempt
        if (held := self._peaks.pop(key, None)) is not None:
            self.promised = tuple(map(sub, self.promised, held))
            self._bounded = tuple(map(sub, self._bounded, held)) if is_bounded else self._bounded
        if peaks is not None:
            self._peaks[key] = peaks
            self.promised = tuple(map(add, self.promised, peaks))
            self._bounded = tuple(map(add, self._bounded, peaks)) if is_bounded else self._bounded


def _fit(peaks: Peaks, taken: Peaks, usable: Peaks) -> bool:
    return all(peak + take <= most for peak, take, most in zip(peaks, taken, usable, strict=True))
