"""Which block lies where: per sequence and group a table (index = ordinal, value = slot or -1), over several pools.

A sequence has three cursors, committed <= history <= capacity, and one atomic `resize`. Stale blocks go with it: after
each prefill chunk, and in decode when the next block is needed. `committed` counts tokens in registered, immutable
blocks: several sequences may refer to the slots of these, and they stay behind, cached, when the last one lets go.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from disagg.cache.cached_sequence import CachedSequence as CachedSequence
from disagg.cache.cached_sequence import PoolUsage as PoolUsage
from disagg.cache.checks import check_references, leave_out
from disagg.cache.errors import PoolExhausted
from disagg.cache.identity import BlockHasher, blocks_of
from disagg.cache.layout import CacheLayout, LayerGroup
from disagg.cache.pool import SlotPool
from disagg.cache.prefix_cache import Chain, Match, PrefixCache, ReuseCount
from disagg.cache.reuse import held_ordinals, longest_common
from disagg.cache.scratch import Scratch, num_scratch_slots, scratch_range
from disagg.cache.slot_memory import OnFilled, ignore
from disagg.cache.table import HOLE, Table, TableChange, change_table, grow_table, is_in, only
from disagg.cache.window import received_whole, stale_range

log = logging.getLogger(__name__)

Held = tuple[NDArray[np.int64], ...]
"""Per group, ordinals, ascending."""


class KVCache:
    """Pools and the sequences that hold their slots. Only the model thread calls it."""

    def __init__(
        self,
        layout: CacheLayout,
        num_slots: Sequence[int],
        device: str = "cpu",
        hasher: BlockHasher | None = None,
        *,
        is_staged: bool = False,
        on_filled: OnFilled = ignore,
    ) -> None:
        """`num_slots[p]` slots in pool p, the reserved two included. Raises PoolMemoryShort.

        `hasher` names blocks for reuse; without one nothing is reused. `is_staged`, `on_filled`: see `SlotMemory`.
        """
        assert len(num_slots) == layout.num_pools
        self.layout = layout
        self.pools: tuple[SlotPool, ...] = ()
        for nbytes, count in zip(layout.slot_nbytes, num_slots, strict=True):
            try:
                self.pools += (SlotPool(nbytes, count, device, is_staged=is_staged, on_filled=on_filled),)
            except Exception:
                self.close()  # a later pool that does not fit must not leave the earlier ones open
                raise
        self.is_staged = any(pool.sides.is_staged for pool in self.pools)
        """Kernels read other memory than peers."""
        self.prefixes = PrefixCache(layout, self.pools, hasher) if hasher is not None else None
        self.journal = self.prefixes.journal if self.prefixes is not None else None
        self._sequences: dict[Hashable, CachedSequence] = {}
        self._num_outdated = [0] * layout.num_groups
        self._scratch_pages = tuple(layout.scratch_pages(group) for group in range(layout.num_groups))
        self._group_views = [
            self.pools[pool].view(group, layout.block_size)
            for group, pool in zip(layout.groups, layout.pool_of_group, strict=True)
        ]

    def open(self, key: Hashable, salt: str = "", precision: str = "") -> CachedSequence:
        """A sequence that holds nothing yet. Blocks are shared within one `salt` and one `precision` history only."""
        assert key not in self._sequences, f"sequence {key} is open already"
        sequence = CachedSequence(key, self._no_tables())
        sequence.chain = Chain(salt, precision=precision) if self.prefixes is not None else None
        self._sequences[key] = sequence
        return sequence

    def resize(
        self,
        sequence: CachedSequence,
        *,
        capacity: int,
        history: int,
        scratch_until: int = 0,
        kept_from: int | None = None,
    ) -> bool:
        """Declare `history` tokens done, make room for `capacity`. False, with nothing changed, when a pool is short.

        Afterwards the sequence holds exactly the ordinals of [0, ceil(capacity/T)) that are not stale at `history`,
        in every group. `history` never goes back; `capacity` may shrink down to it. What is to come is the step that
        stores [history, capacity): new slots are zeroed unless they lie in it whole.
        Blocks of a prefill step that are stale at `scratch_until` go to scratch slots where the layout allows that,
        and are gone with the resize that declares the step history. `kept_from`, at most `history`: what is not stale
        there is held too, so that another sequence may go on from there.
        """
        size = self.layout.block_size
        whole = range(-(-history // size), capacity // size)
        overwritten = [(whole,)] * self.layout.num_groups
        return self._resize(sequence, overwritten, capacity, history, scratch_until, kept_from)

    def _resize(
        self,
        sequence: CachedSequence,
        overwritten: Sequence[Sequence[range]],
        capacity: int,
        history: int,
        scratch_until: int = 0,
        kept_from: int | None = None,
    ) -> bool:
        """`overwritten`: per group, ordinals that are written whole before they are read."""
        assert sequence.is_open, f"sequence {sequence.key} is closed"
        assert sequence.history <= history <= capacity
        scratch = self._scratch_ranges(capacity, history, scratch_until)
        trimmed = history if kept_from is None else max(kept_from, sequence.trimmed)
        changes = self._changes(sequence, capacity, trimmed, scratch)
        if not self._fits(sequence, changes, scratch):
            return False
        self._free_scratch(sequence)
        self._count_outdated(sequence, changes, trimmed)
        self._apply(sequence, changes, overwritten)
        self._allocate_scratch(sequence, scratch)
        sequence.room = self.layout.num_blocks(capacity) * self.layout.block_size
        sequence.capacity, sequence.history, sequence.trimmed = capacity, history, trimmed
        return True

    def close_sequence(self, sequence: CachedSequence, *, wipe: bool = False) -> None:
        """Free all it holds; registered blocks stay cached. `wipe`: its KV may not be finite, so none of it stays."""
        assert self._sequences.pop(sequence.key, None) is sequence, f"sequence {sequence.key} is not open"
        if wipe:
            self.unregister(sequence, 0)
        self._let_go(sequence, wipe=wipe)
        sequence.is_open = False
        sequence.capacity = sequence.history = sequence.committed = sequence.room = 0

    def fork(self, parent: CachedSequence, key: Hashable) -> CachedSequence:
        """A sequence that goes on from `parent`'s history: whole blocks are shared, a last one in part is copied.

        Raises PoolExhausted, with nothing changed, when there is no room for the copy.
        """
        assert parent.is_open
        assert not parent.scratch
        assert parent.trimmed == parent.history, f"{parent.key} holds more than its history needs"
        chain = parent.chain
        sequence = self.open(key, chain.salt, chain.precision) if chain is not None else self.open(key)
        num_whole, size = parent.history // self.layout.block_size, self.layout.block_size
        try:
            self._copy_last(parent, sequence, num_whole)
        except PoolExhausted:
            self.close_sequence(sequence)
            raise
        for table, pool in zip(sequence.tables, self.layout.pool_of_group, strict=True):
            whole = table[:num_whole]
            self.pools[pool].share(whole[whole != HOLE])
        if self.prefixes is not None and chain is not None and sequence.chain is not None:
            self.prefixes.follow(sequence.chain, list(chain.path))
            sequence.chain.is_stopped = chain.is_stopped
        sequence.capacity = sequence.history = sequence.trimmed = parent.history
        sequence.committed, sequence.partial = parent.committed, parent.partial
        sequence.room = self.layout.num_blocks(parent.history) * size
        return sequence

    # --- prefix reuse ---------------------------------------------------------------------------------------

    def reuse_prefix(self, sequence: CachedSequence, tokens: Sequence[int], *, counts: bool = True) -> int:
        """Give a new sequence the longest prefix of `tokens` that all groups can go on from; its length in tokens.

        It becomes history and committed. The last token is never part of it: its logits are wanted. `counts`: whether
        this is a request's first look, which the hit rates tell of.
        """
        assert sequence.capacity == 0, f"sequence {sequence.key} has begun"
        if self.prefixes is None or sequence.chain is None or not self.layout.groups:
            return 0
        size = self.layout.block_size
        limit = (len(tokens) - 1) // size * size
        match = self.prefixes.match(sequence.chain, tokens[:limit])
        if counts:
            self._count(self._held(match, limit), limit)
        count = longest_common(match.resident, self.layout, len(tokens))
        length = count * size
        self._take(
            sequence,
            [
                np.where(self._wanted(group, length, length), slots[:count], HOLE).astype(np.int32)
                for group, slots in zip(self.layout.groups, match.slots, strict=True)
            ],
        )
        self.prefixes.follow(sequence.chain, match.path[:count])
        sequence.capacity = sequence.history = sequence.committed = length
        sequence.room = sequence.trimmed = length
        return length

    def reserve(
        self, sequence: CachedSequence, prompt: Sequence[int], *, capacity: int, among: Held | None = None
    ) -> Held | None:
        """Room for a prompt whose KV will be received: history = its length. None, with nothing changed: no room.

        Per group the needed ordinals that were resident, whichever they are: they are held from here on, need not be
        received and must not be written. Nothing counts as committed before `commit`. `among`: per group, the ordinals
        that the caller knows of; others are not held, and hit rates do not count this look, which is its second.
        """
        assert sequence.capacity == 0, f"sequence {sequence.key} has begun"
        held: Held = tuple(np.empty(0, dtype=np.int64) for _ in self.layout.groups)
        if self.prefixes is not None and sequence.chain is not None:
            match = self.prefixes.match(sequence.chain, prompt)
            held = self._held(match, len(prompt))
            if among is not None:
                held = tuple(map(np.intersect1d, held, among))
            self._take(sequence, [only(slots, kept) for slots, kept in zip(match.slots, held, strict=True)])
            self.prefixes.follow(sequence.chain, match.path)
        size = self.layout.block_size
        received = [received_whole(len(prompt), g.window, g.num_sink_tokens, size) for g in self.layout.groups]
        if not self._resize(sequence, received, capacity, len(prompt)):
            self._let_go(sequence)
            return None
        if among is None:
            self._count(held, len(prompt))
        return held

    def mark_partial(self, sequence: CachedSequence, blocks: Collection[tuple[int, int]]) -> None:
        """These (group, ordinal) were received without some of their tokens: they are not registered when whole."""
        sequence.partial |= frozenset(blocks)

    def commit(self, sequence: CachedSequence, tokens: Sequence[int]) -> None:
        """The KV of these tokens, which follow the committed ones, is stored and right: register their whole blocks.

        They count as history from here. To be called before `resize` is told so, else windows have let go of what could
        have been kept.
        """
        assert sequence.committed + len(tokens) <= sequence.room, f"{sequence.key}: more tokens than blocks"
        if self.prefixes is None or sequence.chain is None or not sequence.is_committing:
            return
        first, blocks = sequence.committed // self.layout.block_size, list(blocks_of(tokens, self.layout.block_size))
        slots = [table[first : first + len(blocks)].copy() for table in sequence.tables]
        for group, ordinal in sequence.partial:
            if first <= ordinal < first + len(blocks):
                slots[group][ordinal - first] = HOLE
        sequence.committed += self.prefixes.register(sequence.chain, first, blocks, slots) * self.layout.block_size
        sequence.history = max(sequence.history, sequence.committed)
        sequence.capacity = max(sequence.capacity, sequence.history)

    def unregister(self, sequence: CachedSequence, ordinal: int) -> int:
        """What lies in this block, in some group, is wrong: it and what extends it are not reused. Slots concerned."""
        chain = sequence.chain
        if self.prefixes is None or chain is None or ordinal >= len(chain.path):
            return 0
        return self.prefixes.unregister(chain.path[ordinal])

    def unregister_slot(self, group: int, slot: int, generation: int) -> int:
        """`unregister` for the block that a slot has held since `generation`. Slots concerned."""
        number = self.layout.pool_of_group[group]
        if self.prefixes is None or int(self.pools[number].generations[slot]) != generation:
            return 0
        node = self.prefixes.node_at(number, slot)
        return self.prefixes.unregister(node) if node is not None else 0

    def reuse_counts(self) -> tuple[ReuseCount, ...]:
        """Per group, blocks asked for and found since start; empty where nothing is reused."""
        counts = self.prefixes.counts if self.prefixes is not None else ()
        return tuple(ReuseCount(count.num_queried, count.num_hit) for count in counts)

    @property
    def num_outdated(self) -> tuple[int, ...]:
        """Per group, blocks of running sequences whose window moved past them, since start; scratch slots do not count.

        A registered one stays cached for others, as ever.
        """
        return tuple(self._num_outdated)

    # --- memory ---------------------------------------------------------------------------------------------

    def publish(self, group: int, slots: Sequence[int]) -> None:
        """These slots of a group are final: make them visible to peers. Call before any peer is told of them."""
        self.pools[self.layout.pool_of_group[group]].sides.publish(np.asarray(slots, dtype=np.int64))

    def take_in(self, group: int, slots: Sequence[int]) -> None:
        """What a peer sent for these slots of a group was verified: copy it to where kernels read. For any thread."""
        self.pools[self.layout.pool_of_group[group]].sides.take_in(np.asarray(slots, dtype=np.int64))

    def layer_view(self, layer_index: int) -> torch.Tensor:
        """KV that a layer reads and writes: [num_slots, 2 (K, V), kv_heads, block_size, head_dim], strided, no copy."""
        group, position = self.layout.place(layer_index)
        return self._group_views[group][:, position]

    def group_view(self, group: int) -> torch.Tensor:
        """All layers of a group: [num_slots, layers, 2 (K, V), kv_heads, block_size, head_dim], no copy."""
        return self._group_views[group]

    def page_view(self, group: int) -> torch.Tensor:
        """A group as pages, page = slot * layers + place: [num_slots * layers, 2, kv_heads, block_size, head_dim]."""
        return self._group_views[group].flatten(0, 1)

    def close(self) -> None:
        """Close the pools' memfds; views that are still held stay valid."""
        for pool in self.pools:
            pool.close()

    # --- figures and checks ---------------------------------------------------------------------------------

    @property
    def num_scratch(self) -> tuple[int, ...]:
        """Per pool, the used slots that are scratch: none between steps."""
        counts = [0] * len(self.pools)
        if self.layout.uses_scratch:
            for sequence in self._sequences.values():
                for pool, scratch in self._scratch_of(sequence):
                    counts[pool] += len(scratch.slots)
        return tuple(counts)

    def num_held(self, sequence: CachedSequence) -> tuple[int, ...]:
        """Per pool, the slots that the sequence refers to, scratch included."""
        counts = [0] * len(self.pools)
        for table, pool in zip(sequence.tables, self.layout.pool_of_group, strict=True):
            counts[pool] += int((table != HOLE).sum())
        for pool, scratch in self._scratch_of(sequence):
            counts[pool] += len(scratch.slots)
        return tuple(counts)

    def usage(self) -> tuple[PoolUsage, ...]:
        return tuple(
            PoolUsage(p.slot_nbytes, p.num_slots, p.num_used, p.num_free, p.peak_used, p.num_cached, p.num_evicted)
            for p in self.pools
        )

    def check_invariants(self) -> None:
        """Every reference is one table entry; tables hold exactly what cursors say; what is shared is not written."""
        check_references(self.layout, self.pools, tuple(self._sequences.values()))
        for sequence in self._sequences.values():
            self._check_sequence(sequence)
        if self.prefixes is not None:
            self.prefixes.check_invariants()

    def _check_sequence(self, sequence: CachedSequence) -> None:
        assert 0 <= sequence.committed <= sequence.history <= sequence.capacity <= sequence.room
        assert sequence.trimmed <= sequence.history
        first_written = sequence.history // self.layout.block_size
        for number, (group, table) in enumerate(zip(self.layout.groups, sequence.tables, strict=True)):
            pool = self.layout.pool_of_group[number]
            wanted = self._wanted(group, sequence.capacity, sequence.trimmed)
            leave_out(wanted, sequence.scratch[number] if sequence.scratch else None)
            assert ((table != HOLE) == wanted).all(), f"{sequence.key}: group {group.name} holds other than it needs"
            written = table[first_written:][wanted[first_written:]].astype(np.int64)
            assert (self.pools[pool].num_refs(written) == 1).all(), f"{sequence.key}: writes a shared slot"
            assert not any(self.pools[pool].is_registered(slot) for slot in written), "a registered slot is written"

    # --- how it is done -------------------------------------------------------------------------------------

    def _no_tables(self) -> tuple[Table, ...]:
        return tuple(np.empty(0, dtype=np.int32) for _ in self.layout.groups)

    def _copy_last(self, parent: CachedSequence, sequence: CachedSequence, num_whole: int) -> None:
        """The parent's table up to its history; a block that it will write is copied, in all groups or none."""
        num_blocks = self.layout.num_blocks(parent.history)
        pools = [self.pools[number] for number in self.layout.pool_of_group]
        tables = [table[:num_blocks].copy() for table in parent.tables]
        if num_blocks > num_whole:
            wanted = Counter(self.layout.pool_of_group)
            if any(self.pools[number].num_free < count for number, count in wanted.items()):
                raise PoolExhausted(f"{parent.key}: no room for a copy of its last block")
            for table, pool in zip(tables, pools, strict=True):
                table[num_whole] = pool.copy(int(table[num_whole]))
        sequence.tables = tuple(tables)

    def _take(self, sequence: CachedSequence, tables: Sequence[Table]) -> None:
        """Refer to registered slots: the first that a new sequence holds."""
        for table, pool in zip(tables, self.layout.pool_of_group, strict=True):
            self.pools[pool].retain(table[table != HOLE])
        sequence.tables = tuple(tables)

    def _let_go(self, sequence: CachedSequence, *, wipe: bool = False) -> None:
        """Free every slot, the deepest ordinals first: of what stays cached these are evicted first."""
        for number, pool in enumerate(self.pools):
            tables = [t for t, p in zip(sequence.tables, self.layout.pool_of_group, strict=True) if p == number]
            ordinals = np.concatenate([np.flatnonzero(table != HOLE) for table in tables])
            slots = np.concatenate([table[table != HOLE] for table in tables])
            pool.free(slots[np.argsort(-ordinals, kind="stable")].tolist(), wipe=wipe)
        sequence.tables = self._no_tables()
        self._free_scratch(sequence, wipe=wipe)
        if self.prefixes is not None and sequence.chain is not None:
            self.prefixes.leave(sequence.chain)

    def _held(self, match: Match, length: int) -> Held:
        """What is there of the blocks that go on being read after `length` tokens."""
        return tuple(
            held_ordinals(resident, group, self.layout.block_size, length)
            for group, resident in zip(self.layout.groups, match.resident, strict=True)
        )

    def _count(self, held: Held, length: int) -> None:
        """Asked for: the blocks that go on being read after `length` tokens, as far as they are whole."""
        if self.prefixes is None:
            return
        every = np.ones(length // self.layout.block_size, dtype=np.bool_)
        for number, (group, ordinals) in enumerate(zip(self.layout.groups, held, strict=True)):
            queried = held_ordinals(every, group, self.layout.block_size, length)
            self.prefixes.count(number, len(queried), len(ordinals))

    def _wanted(self, group: LayerGroup, capacity: int, history: int) -> NDArray[np.bool_]:
        """Which ordinals of [0, ceil(capacity/T)) must have a slot: those that are not stale at `history`."""
        wanted = np.ones(self.layout.num_blocks(capacity), dtype=np.bool_)
        stale = self._stale(group, history)
        wanted[stale.start : stale.stop] = False
        return wanted

    def _changes(
        self, sequence: CachedSequence, capacity: int, history: int, scratch: Sequence[range]
    ) -> list[TableChange]:
        """Per group, what becomes of its table: stale blocks go, and scratch blocks have no slot of their own."""
        num_blocks = self.layout.num_blocks(capacity)
        holds_all = sequence.room == sequence.num_blocks * self.layout.block_size and not sequence.scratch
        only_grows = holds_all and not scratch and num_blocks >= sequence.num_blocks
        changes = []
        for number, (group, table) in enumerate(zip(self.layout.groups, sequence.tables, strict=True)):
            stale = self._stale(group, history)
            if only_grows:
                changes.append(grow_table(table, num_blocks, self._stale(group, sequence.trimmed), stale))
            else:
                changes.append(change_table(table, num_blocks, (stale, scratch[number]) if scratch else (stale,)))
        return changes

    def _stale(self, group: LayerGroup, history: int) -> range:
        return stale_range(history, group.window, group.num_sink_tokens, self.layout.block_size)

    def _apply(
        self, sequence: CachedSequence, changes: Sequence[TableChange], overwritten: Sequence[Sequence[range]]
    ) -> None:
        """Free in every group before any group allocates: groups that share a pool live off each other's blocks."""
        pools = [self.pools[number] for number in self.layout.pool_of_group]
        for change, pool in zip(changes, pools, strict=True):
            if len(change.dropped):
                pool.free(change.dropped.tolist())
        for change, pool, ranges in zip(changes, pools, overwritten, strict=True):
            change.table[change.holes.start : change.holes.stop] = HOLE
            if len(missing := change.missing):
                change.table[missing] = pool.allocate(len(missing), overwritten=is_in(missing, ranges))
        sequence.tables = tuple(change.table for change in changes)

    def _count_outdated(self, sequence: CachedSequence, changes: Sequence[TableChange], history: int) -> None:
        for number, change in enumerate(changes):
            if change.num_stale:
                self._num_outdated[number] += change.num_stale
                name = self.layout.groups[number].name
                log.debug(
                    "%s: the window of %s lets go of %d blocks at %d", sequence.key, name, change.num_stale, history
                )

    def _scratch_ranges(self, capacity: int, history: int, scratch_until: int) -> tuple[range, ...]:
        """Per group, the ordinals that go to scratch slots; empty when there are none in any group."""
        if not scratch_until or not self.layout.uses_scratch:
            return ()
        size = self.layout.block_size
        ranges = tuple(
            scratch_range(history, capacity, scratch_until, g.window, g.num_sink_tokens, size) if pages else range(0)
            for g, pages in zip(self.layout.groups, self._scratch_pages, strict=True)
        )
        return ranges if any(ranges) else ()

    def _scratch_of(self, sequence: CachedSequence) -> Iterator[tuple[int, Scratch]]:
        """(pool, scratch) of each group that has some."""
        for group, scratch in enumerate(sequence.scratch):
            if scratch is not None:
                yield self.layout.pool_of_group[group], scratch

    def _free_scratch(self, sequence: CachedSequence, *, wipe: bool = False) -> None:
        for pool, scratch in self._scratch_of(sequence):
            self.pools[pool].free(scratch.slots, wipe=wipe)
        sequence.scratch = ()

    def _allocate_scratch(self, sequence: CachedSequence, ranges: Sequence[range]) -> None:
        found: list[Scratch | None] = []
        for group, blocks in enumerate(ranges):
            count = num_scratch_slots(len(blocks), self._scratch_pages[group] or 1)
            overwritten = np.ones(count, dtype=np.bool_)  # each layer stores its pages before anything reads them
            pool = self.pools[self.layout.pool_of_group[group]]
            slots = pool.allocate(count, overwritten=overwritten) if count else ()
            found.append(Scratch(blocks.start, len(blocks), tuple(slots)) if count else None)
        sequence.scratch = tuple(found)

    def _fits(self, sequence: CachedSequence, changes: Sequence[TableChange], scratch: Sequence[range]) -> bool:
        """Whether each pool can give the difference; groups that share a pool add up."""
        short = [-pool.num_free for pool in self.pools]
        for group, blocks in enumerate(scratch):
            short[self.layout.pool_of_group[group]] += num_scratch_slots(len(blocks), self._scratch_pages[group] or 1)
        for change, pool in zip(changes, self.layout.pool_of_group, strict=True):
            short[pool] += len(change.missing)
        if max(short, default=0) <= 0:
            return True  # whatever is given back first
        for pool, held in self._scratch_of(sequence):
            short[pool] -= len(held.slots)
        for change, pool in zip(changes, self.layout.pool_of_group, strict=True):
            short[pool] -= self.pools[pool].num_sole(change.dropped)
        return max(short) <= 0
