"""One pool: memory cut into equal slots (`SlotMemory`), and how many sequences refer to each of them.

A slot's generation is raised at each allocation and each free, *before* the slot's first byte changes, so a reader that
sees the same even or odd number before and after its copy has an early, cheap hint that nothing moved; the digest is
the proof.
A used or cached slot has an odd generation, an empty one an even one.

A slot is *empty*, *used* (so many references to it) or *cached*: registered for reuse, without references. A
cached slot is as good as an empty one: `allocate` evicts it, least recently used first, when no empty one is left.

Two slots are reserved: NULL is always zero and the only one that padding reads; TRASH is the only one that padding
writes, and never read. A block that is filled token by token is read whole from its first token on: attention weighs
the places behind with 0, and 0 times NaN is NaN. So a slot is zeroed when it is allocated, unless all of it will be
written before any of it is read: by the one step that it is allocated for, or by a transfer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from disagg.cache.errors import PoolExhausted
from disagg.cache.layout import LayerGroup
from disagg.cache.slot_memory import OnFilled, SlotMemory, ignore
from disagg.cache.table import Table

NULL_SLOT = 0
TRASH_SLOT = 1
NUM_RESERVED_SLOTS = 2

_ONE = np.uint64(1)
_TWO = np.uint64(2)


class SlotPool:
    """`num_slots` slots of `slot_nbytes` bytes, the two reserved ones included. Single threaded.

    `device`, `is_staged`, `on_filled`: see `SlotMemory`. Raises PoolMemoryShort when there is no room.
    `on_evict(slots)` is told of cached slots that are about to be emptied for another sequence.
    """

    def __init__(
        self,
        slot_nbytes: int,
        num_slots: int,
        device: str = "cpu",
        *,
        is_staged: bool = False,
        on_filled: OnFilled = ignore,
    ) -> None:
        assert slot_nbytes > 0
        assert num_slots > NUM_RESERVED_SLOTS, "a pool of reserved slots seats nothing"
        self.slot_nbytes, self.num_slots, self.device = slot_nbytes, num_slots, device
        self.sides = SlotMemory(slot_nbytes, num_slots, device, is_staged=is_staged, on_filled=on_filled)
        self.generations = self.sides.generations
        self._is_empty: NDArray[np.bool_] = np.ones(num_slots, dtype=np.bool_)
        self._is_empty[:NUM_RESERVED_SLOTS] = False
        self._num_refs: NDArray[np.int32] = np.zeros(num_slots, dtype=np.int32)
        self._is_registered: NDArray[np.bool_] = np.zeros(num_slots, dtype=np.bool_)
        self.tainted: set[int] = set()
        """Slots whose content was found wrong, or may not be finite, while a sequence still refers to them."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_empty = num_slots - NUM_RESERVED_SLOTS
        self.on_evict: Callable[[Sequence[int]], None] = _forget_nothing
        self.num_evicted = 0
        self.peak_used = 0
        self._lowest = 0
        """No slot before it is empty."""

    @property
    def memory(self) -> torch.Tensor:
        """uint8 [num_slots, slot_nbytes]: what kernels read and write."""
        return self.sides.slots

    @property
    def num_cached(self) -> int:
        """Registered slots without references."""
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Slots that can be allocated now: the empty and the cached ones."""
        return self._num_empty + len(self._cached)

    @property
    def num_used(self) -> int:
        """Slots that sequences refer to, each counted once; the reserved ones do not count."""
        return self.num_slots - NUM_RESERVED_SLOTS - self.num_free

    def allocate(self, count: int, *, overwritten: NDArray[np.bool_] | None = None) -> list[int]:
        """Take `count` slots, as one run where one is empty, else the lowest. PoolExhausted changes nothing.

        They are zeroed, since a kernel may read more of a slot than was stored in it; except those marked in
        `overwritten` (bool [count]), which are written whole before anything reads them and keep what they held:
        clearing them would cost the model thread as much as a copy of them.
        """
        if count > self.num_free:
            raise PoolExhausted(f"{count} slots of {self.slot_nbytes} bytes asked, {self.num_free} free")
        if not count:
            return []
        if self._num_empty < count:
            self._evict_oldest(count - self._num_empty)
        slots = self._choose(count)
        taken: list[int] = slots.tolist()
        is_run = taken[-1] - taken[0] == count - 1
        index = slice(taken[0], taken[-1] + 1) if is_run else slots  # numpy follows a slice many times faster
        self._is_empty[index] = False
        self._num_refs[index] = 1
        self._num_empty -= count
        self.peak_used = max(self.peak_used, self.num_used)
        self.generations[index] += _ONE
        self.sides.zero(slots if overwritten is None else slots[~overwritten])
        return taken

    def retain(self, slots: Table) -> None:
        """One more reference to each of these registered slots, no two alike; cached ones are used from here."""
        assert self._is_registered[slots].all(), "a slot is shared that is not registered"
        cached = slots[self._num_refs[slots] == 0]
        self._num_refs[slots] += 1
        for slot in cached.tolist():
            del self._cached[slot]
        self.peak_used = max(self.peak_used, self.num_used)

    def share(self, slots: Table) -> None:
        """One more reference to each of these used slots, whose blocks are whole and are not written any more."""
        assert (self._num_refs[slots] > 0).all(), "a slot is shared that no sequence holds"
        self._num_refs[slots] += 1

    def rename(self, slots: Sequence[int]) -> None:
        """These used slots were shown to peers and will be written again: their generations are raised before that."""
        index = np.asarray(slots, dtype=np.int64)
        assert (self._num_refs[index] == 1).all(), "a slot is written that is shared"
        assert not self._is_registered[index].any(), "a slot is written that is registered"
        self.generations[index] += _TWO  # a used slot's stays odd

    def copy(self, source: int) -> int:
        """A new slot with the bytes of another. Raises PoolExhausted."""
        (slot,) = self.allocate(1, overwritten=np.ones(1, dtype=np.bool_))
        self.memory[slot] = self.memory[source]
        return slot

    def free(self, slots: Sequence[int], *, wipe: bool = False) -> None:
        """Give one reference to each slot back; the first of those that stay cached will be evicted first.

        `wipe` zeroes them with the last reference: for a sequence that may have left NaN or Inf behind.
        """
        index = np.asarray(slots, dtype=np.int64)
        refs = self._num_refs[index]
        assert min(slots, default=NUM_RESERVED_SLOTS) >= NUM_RESERVED_SLOTS, "a reserved slot was freed"
        assert refs.all(), "a free slot was freed"
        assert len(set(slots)) == len(slots), "a slot was freed twice in one call"
        if wipe:
            self.tainted.update(slots)
        self._num_refs[index] = refs - 1
        index = index[refs == 1]
        kept = self._is_registered[index]
        self._cached.update(dict.fromkeys(index[kept].tolist()))
        self._empty(index[~kept])

    def register(self, slots: Sequence[int]) -> None:
        """Used slots hold whole blocks that others may use: they stay when the last reference goes."""
        index = np.asarray(slots, dtype=np.int64)
        assert (self._num_refs[index] > 0).all(), "a slot is registered that was never written"
        assert self.tainted.isdisjoint(slots), "a slot is registered that may not be finite"
        self._is_registered[index] = True

    def unregister(self, slots: Sequence[int]) -> None:
        """These slots are not found any more, nor registered again; they are zeroed as soon as they are empty."""
        index = np.asarray(slots, dtype=np.int64)
        self._is_registered[index] = False
        self.tainted.update(slots)
        cached = index[self._num_refs[index] == 0]
        for slot in cached.tolist():
            del self._cached[slot]
        self._empty(cached)

    def touch(self, slots: Sequence[int]) -> None:
        """Of these, cached ones are evicted after all others; the first of them before the rest."""
        for slot in slots:
            if slot in self._cached:
                self._cached.move_to_end(slot)

    def is_registered(self, slot: int) -> bool:
        return bool(self._is_registered[slot])

    @property
    def num_registered(self) -> int:
        return int(self._is_registered.sum())

    def num_refs(self, slots: NDArray[np.int64]) -> NDArray[np.int32]:
        """References to each slot."""
        return self._num_refs[slots]

    def num_sole(self, slots: NDArray[np.int32]) -> int:
        """How many of these slots one more `free` would give to others."""
        return int((self._num_refs[slots] == 1).sum()) if len(slots) else 0

    def view(self, group: LayerGroup, block_size: int) -> torch.Tensor:
        """The pool as `group` sees it: [num_slots, layers, 2 (K, V), kv_heads, block_size, head_dim], no copy."""
        assert group.slot_nbytes(block_size) == self.slot_nbytes
        elements = self.memory.view(getattr(torch, group.dtype))
        shape = (self.num_slots, len(group.layers), 2, group.num_kv_heads, block_size, group.head_dim)
        return elements.view(shape)

    def close(self) -> None:
        """Close the memfd; views that are still held stay valid."""
        self.sides.close()

    def check_invariants(self) -> None:
        """Every slot is empty, cached or used, and exactly one of these."""
        own, refs = slice(NUM_RESERVED_SLOTS, None), self._num_refs
        cached = np.zeros(self.num_slots, dtype=np.bool_)
        cached[list(self._cached)] = True
        assert not self._is_empty[:NUM_RESERVED_SLOTS].any(), "a reserved slot is free"
        assert int(self._is_empty.sum()) == self._num_empty, "the empty slots are miscounted"
        assert not self._is_empty[: self._lowest].any(), "an empty slot would never be found"
        assert not self.generations[:NUM_RESERVED_SLOTS].any(), "a reserved slot changed hands"
        assert ((self.generations[own] % 2 == 0) == self._is_empty[own]).all(), "a generation missed a change"
        assert (refs >= 0).all()
        assert (self._is_empty[own].astype(int) + cached[own] + (refs[own] > 0) == 1).all(), "a slot is two things"
        assert (cached == (self._is_registered & (refs == 0))).all(), "a registered slot is neither used nor cached"
        assert not (self._is_registered | self._is_empty)[list(self.tainted)].any(), "a tainted slot is offered"
        assert not self.memory[NULL_SLOT].any(), "the NULL slot was written"

    def _evict_oldest(self, count: int) -> None:
        slots = [self._cached.popitem(last=False)[0] for _ in range(count)]
        self.on_evict(slots)
        index = np.array(slots)
        self._is_registered[index] = False
        self.num_evicted += count
        self._empty(index)

    def _empty(self, slots: NDArray[np.int64]) -> None:
        """The slots hold nothing any more."""
        if not len(slots):
            return
        self.generations[slots] += _ONE
        if self.tainted and (tainted := self.tainted.intersection(slots.tolist())):
            self.sides.zero(np.array(sorted(tainted)))
            self.tainted -= tainted
        self._is_empty[slots] = True
        self._lowest = min(self._lowest, int(slots.min()))
        self._num_empty += len(slots)

    def _choose(self, count: int) -> NDArray[np.int64]:
        """First run of `count` empty slots, else the lowest ones: runs make transfers and copies few and large."""
        if count == 1:
            self._lowest += int(self._is_empty[self._lowest :].argmax())  # stops at the first
            return np.array([self._lowest])
        free = np.flatnonzero(self._is_empty)
        starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        first = starts[0] if len(starts) else 0
        return free[first : first + count]


def _forget_nothing(slots: Sequence[int]) -> None:
    """No slot is registered, so none is evicted."""
