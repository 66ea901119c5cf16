"""Any order of admit, chunk, decode, fork, import, evict, preempt, cancel and loss of trust, beside a naive cache.

Some examples prefill with scratch slots. Every layer's tokens are written into the pages it has and read back through
them, within the step and after it; whatever no sequence may read holds NaN.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.oracles.cache_oracle import readable_later, tiny_layout
from support.oracles.prefix_oracle import NaivePrefixes

from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.journal import BlockDropped, BlockStored, JournalRestart
from disagg.cache.pool import NUM_RESERVED_SLOTS, TRASH_SLOT
from disagg.cache.scratch import page_table
from disagg.cache.table import HOLE

torch.set_num_threads(1)
T = 4
SALTS = ("", "", "tenant")
FIRST_PROMPT = tuple(position * position % 2 for position in range(26))
TAILS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
NUM_SLOTS = (22, 70)
BACK = st.none() | st.integers(0, 9)
"""How far before the end of a step blocks must be stale to be scratch; None: there is no scratch."""


class Model:
    """A sequence as the test sees it. `received`: per group what a reservation did not wait for, until it is whole."""

    def __init__(self, sequence, salt, tokens):
        self.sequence, self.salt, self.tokens = sequence, salt, tokens
        self.received = None
        self.may_be_stopped = False


class PrefixMachine(RuleBasedStateMachine):
    hasher_class = BlockHasher
    is_complete = True
    """Whether all that the naive cache knows is known here: names that collide leave blocks out."""

    def __init__(self):
        super().__init__()
        self.models, self.prompts, self.num_opened, self.cache = [], [FIRST_PROMPT], 0, None
        self.build(uses_scratch=False)

    def build(self, *, uses_scratch):
        if self.cache:
            self.cache.close()
        layout = tiny_layout(6, 6, None, 1, 11, block_size=T, num_sink_tokens=3)
        self.layout = replace(layout, uses_scratch=uses_scratch)
        num_slots = [NUM_RESERVED_SLOTS + count for count in NUM_SLOTS]
        self.cache = KVCache(self.layout, num_slots, hasher=self.hasher_class(b"key", "model"))
        self.naive = NaivePrefixes(self.layout, NUM_SLOTS)
        self.told = set()
        self.cache.journal.begin()

    @initialize(uses_scratch=st.booleans())
    def begin(self, uses_scratch):
        self.build(uses_scratch=uses_scratch)

    # --- rules ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.models) < 4)
    @rule(data=st.data(), salt=st.sampled_from(SALTS), tail=TAILS)
    def admit(self, data, salt, tail):
        self.reuse(self.open(data, salt, tail))

    @precondition(lambda self: len(self.models) < 4)
    @rule(data=st.data(), salt=st.sampled_from(SALTS), tail=TAILS)
    def reserve(self, data, salt, tail):
        model = self.open(data, salt, tail)
        expected = [self.naive.held(group, salt, model.tokens) for group in range(self.layout.num_groups)]
        held = self.cache.reserve(model.sequence, model.tokens, capacity=len(model.tokens) + 1)
        if self.is_complete:
            places = [(group, ordinal) for group, ordinals in enumerate(expected) for ordinal in ordinals]
            self.naive.take(model.sequence.key, model.tokens, places)
            fits = self.naive.resize(model.sequence.key, len(model.tokens) + 1, len(model.tokens))
            assert fits == (held is not None)
            assert held is None or [mine.tolist() for mine in held] == expected
        if held is None:
            self.close_model(model)
            return
        model.received = [set(ordinals.tolist()) for ordinals in held]
        self.fill_missing(model, float("nan"))

    @precondition(lambda self: self.running())
    @rule(data=st.data(), count=st.integers(1, 9) | st.just(50), back=BACK)
    def chunk(self, data, count, back):
        self.compute(data.draw(st.sampled_from(self.running())), count, back)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data, token):
        model = data.draw(st.sampled_from(self.running()))
        if model.sequence.history == len(model.tokens):
            model.tokens += (token,)
        self.compute(model, 1)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), back=BACK)
    def finish(self, data, back):
        model = data.draw(st.sampled_from(self.running()))
        self.compute(model, 8, back)
        self.compute(model, 50, back)
        self.prompts = [*self.prompts[-3:], model.tokens[:40]]
        self.close_model(model)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def preempt(self, data):
        """Its blocks are taken; at once it begins again with what is left of them."""
        model = data.draw(st.sampled_from(self.running()))
        self.close_sequence(model)
        model.sequence, model.may_be_stopped = self.open_sequence(model.salt), False
        self.reuse(model)

    @precondition(lambda self: self.reserved())
    @rule(data=st.data())
    def verify(self, data):
        """What was missing arrives, whole slots of it, and is right."""
        model = data.draw(st.sampled_from(self.reserved()))
        self.fill_missing(model, 0.0)
        for group, spec in enumerate(self.layout.groups):
            for layer in range(len(spec.layers)):
                self.write(model, group, layer, 0, len(model.tokens), without=model.received[group])
        model.received = None
        self.commit(model, len(model.tokens))

    @precondition(lambda self: self.models)
    @rule(data=st.data(), wipe=st.booleans())
    def cancel(self, data, wipe):
        model = data.draw(st.sampled_from(self.models))
        if wipe:
            self.distrust(model, 0)
        self.close_model(model, wipe=wipe)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), count=st.integers(1, 40), back=BACK)
    def cancel_in_mid_step(self, data, count, back):
        model = data.draw(st.sampled_from(self.running()))
        self.resize(model, model.sequence.history + count, model.sequence.history, back)
        self.close_model(model)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def unregister(self, data):
        model = data.draw(st.sampled_from(self.running()))
        if model.sequence.committed:
            ordinal = data.draw(st.integers(0, model.sequence.committed // T - 1))
            self.distrust(model, ordinal)
            self.cache.unregister(model.sequence, ordinal)

    @rule(count=st.integers(8, 90))
    def evict(self, count):
        """Somebody else needs the room: whatever is cached may go."""
        other = Model(self.open_sequence("nobody else's"), "nobody else's", ())
        self.resize(other, count, 0, None)
        self.close_sequence(other)

    # --- helpers ----------------------------------------------------------------------------------------------

    def running(self):
        return [model for model in self.models if model.received is None]

    def reserved(self):
        return [model for model in self.models if model.received is not None]

    def open(self, data, salt, tail):
        """A prompt that begins like an earlier one."""
        base = data.draw(st.sampled_from(self.prompts))
        tokens = base[: data.draw(st.just(len(base)) | st.integers(0, len(base)))] + tuple(tail)
        self.prompts = [*self.prompts[-3:], tokens[:40]]
        return self.add(salt, tokens)

    def add(self, salt, tokens):
        self.models.append(Model(self.open_sequence(salt), salt, tokens))
        return self.models[-1]

    def open_sequence(self, salt):
        self.num_opened += 1
        self.naive.open(self.num_opened, salt)
        return self.cache.open(self.num_opened, salt)

    def reuse(self, model):
        expected = self.naive.longest(model.salt, model.tokens)
        reused = self.cache.reuse_prefix(model.sequence, model.tokens)
        assert model.sequence.committed == model.sequence.history == model.sequence.capacity == reused
        if self.is_complete:
            assert reused == expected
            self.naive.reuse(model.sequence.key, model.tokens)

    def resize(self, model, capacity, history, back):
        until = 0 if back is None else max(0, capacity - back)
        fits = self.cache.resize(model.sequence, capacity=capacity, history=history, scratch_until=until)
        if self.is_complete:
            assert fits == self.naive.resize(model.sequence.key, capacity, history, until)
        return fits

    def close_model(self, model, *, wipe=False):
        self.models.remove(model)
        self.close_sequence(model, wipe=wipe)

    def close_sequence(self, model, *, wipe=False):
        self.cache.close_sequence(model.sequence, wipe=wipe)
        self.naive.close(model.sequence.key)

    def compute(self, model, count, back=None):
        start = model.sequence.history
        end = min(start + count, len(model.tokens))
        if start == end or not self.resize(model, end, start, back):
            return
        self.spoil()
        for group, scratch in enumerate(model.sequence.scratch):
            if scratch is not None:  # every layer writes before it reads
                self.cache.group_view(group)[list(scratch.slots)] = float("nan")
        for group, spec in enumerate(self.layout.groups):
            for layer in range(len(spec.layers)):
                self.run_layer(model, group, layer, start, end)
        self.commit(model, end)
        assert self.resize(model, end, end, None)

    def run_layer(self, model, group, layer, start, end):
        """One layer stores the step's tokens; then its queries read."""
        self.write(model, group, layer, start, end)
        self.check_readable(model, group, layer, start, end)

    def commit(self, model, end):
        sequence = model.sequence
        before = sequence.committed
        self.cache.commit(sequence, model.tokens[before:end])
        assert sequence.committed <= end
        if self.is_complete:
            self.naive.write_down(sequence.key, model.tokens, before, sequence.committed)
            assert model.may_be_stopped or sequence.committed == end // T * T

    def distrust(self, model, ordinal):
        """One that was taken out of reach before is no longer this one: others may have computed it anew."""
        if all(node.is_dead for node in model.sequence.chain.path[ordinal : ordinal + 1]):
            return
        prefix = model.tokens[: (ordinal + 1) * T]
        self.naive.strike_out(model.salt, prefix)
        for other in self.models:
            other.may_be_stopped |= other.salt == model.salt and other.tokens[: len(prefix)] == prefix

    def value(self, model, position, layer):
        return torch.tensor([model.tokens[position] + 1.0 + 10 * layer, position + 1000.0 * SALTS.index(model.salt)])

    def pages(self, model, group, layer):
        scratch = model.sequence.scratch[group] if model.sequence.scratch else None
        num_layers = len(self.layout.groups[group].layers)
        return page_table(model.sequence.tables[group], scratch, num_layers, layer)

    def write(self, model, group, layer, start, end, without=()):
        pages, view = self.pages(model, group, layer), self.cache.page_view(group)
        for position in range(start, end):
            page = int(pages[position // T])
            if page != HOLE and position // T not in without:
                view[page, :, 0, position % T] = self.value(model, position, layer)

    def check_readable(self, model, group, layer, first_query, end):
        """Every key below `end` that a query from `first_query` on reads is where the layer looks for it."""
        spec, pages, view = self.layout.groups[group], self.pages(model, group, layer), self.cache.page_view(group)
        for position in range(end):
            if readable_later(position, first_query, spec.window, spec.num_sink_tokens):
                page = int(pages[position // T])
                assert page >= NUM_RESERVED_SLOTS * len(spec.layers)
                stored = view[page, :, 0, position % T]
                assert (stored == self.value(model, position, layer)).all(), "another token, or none, is read"

    def fill_missing(self, model, value):
        """Every byte of the blocks that a reservation waits for."""
        for group, table in enumerate(model.sequence.tables):
            awaited = np.arange(len(table)) < -(-len(model.tokens) // T)
            awaited[list(model.received[group])] = False
            self.cache.group_view(group)[table[awaited & (table != HOLE)].tolist()] = value

    def spoil(self):
        """What is nobody's, and the slot that only padding writes."""
        for pool in self.cache.pools:
            is_empty = pool.generations % 2 == 0
            is_empty[:NUM_RESERVED_SLOTS] = False
            pool.memory.view(torch.float32)[[TRASH_SLOT, *np.flatnonzero(is_empty)]] = float("nan")

    @rule()
    def ask_anew(self):
        """Whoever follows the journal missed something: the whole set is told."""
        self.cache.journal.begin()

    # --- invariants -------------------------------------------------------------------------------------------

    @invariant()
    def nothing_leaks(self):
        self.cache.check_invariants()
        assert self.cache.num_scratch == (0,) * self.layout.num_pools
        used = [set() for _ in self.cache.pools]
        for model in self.models:
            for table, pool in zip(model.sequence.tables, self.layout.pool_of_group, strict=True):
                used[pool] |= set(table[table != HOLE].tolist())
        assert [len(slots) for slots in used] == [usage.num_used for usage in self.cache.usage()]

    @precondition(lambda self: self.is_complete)
    @invariant()
    def what_is_kept_is_what_the_naive_cache_keeps(self):
        usage = self.cache.usage()
        assert [pool.num_cached for pool in usage] == [len(kept) for kept in self.naive.kept]
        assert [pool.num_free - pool.num_cached for pool in usage] == self.naive.num_empty

    @invariant()
    def the_journal_tells_what_is_registered(self):
        for event in self.cache.journal.take(10**6):
            match event:
                case JournalRestart():
                    self.told = set()
                case BlockStored(identity, groups):
                    assert not self.told & {(identity, group) for group in groups}, "told twice"
                    self.told |= {(identity, group) for group in groups}
                case BlockDropped(identity, groups):
                    assert {(identity, group) for group in groups} <= self.told, "dropped before it was stored"
                    self.told -= {(identity, group) for group in groups}
        nodes = self.cache.prefixes.tree
        assert self.told == {(n.identity, group) for n in nodes for group, slot in enumerate(n.slots) if slot >= 0}

    @invariant()
    def every_query_reads_its_own_tokens(self):
        self.spoil()
        for model in self.running():
            for group, spec in enumerate(self.layout.groups):
                for layer in range(len(spec.layers)):
                    self.check_readable(model, group, layer, model.sequence.history, model.sequence.history)

    def teardown(self):
        for model in list(self.models):
            self.close_model(model)
        self.cache.check_invariants()
        assert all(usage.num_used == 0 for usage in self.cache.usage())
        self.cache.close()
