"""Any order of admit, chunk, decode, fork, import, evict, cancel and loss of trust, beside a naive cache.

Tokens are written into the slots and read back through the tables; whatever no sequence may read holds NaN.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.cache_oracle import readable_later, tiny_layout
from support.prefix_oracle import NaivePrefixes

from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.table import HOLE

torch.set_num_threads(1)
T = 4
SALTS = ("", "", "tenant")
FIRST_PROMPT = tuple(position * position % 2 for position in range(26))
TAILS = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class Model:
    """A sequence as the test sees it."""

    def __init__(self, sequence, salt, tokens):
        self.sequence, self.salt, self.tokens = sequence, salt, tokens
        self.received = None
        self.may_be_stopped = False


class PrefixMachine(RuleBasedStateMachine):
    hasher_class = BlockHasher
    is_complete = True

    def __init__(self):
        super().__init__()
        self.layout = tiny_layout(6, 6, None, 1, 11, block_size=T, num_sink_tokens=3)
        self.cache = KVCache(self.layout, (2 + 22, 2 + 70), hasher=self.hasher_class(b"key", "model"))
        self.naive = NaivePrefixes(self.cache)
        self.models, self.prompts, self.num_opened = [], [FIRST_PROMPT], 0

    # --- rules ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.models) < 4)
    @rule(data=st.data(), salt=st.sampled_from(SALTS), tail=TAILS)
    def admit(self, data, salt, tail):
        model = self.open(data, salt, tail)
        expected = self.naive.longest(salt, model.tokens)
        reused = self.cache.reuse_prefix(model.sequence, model.tokens)
        assert reused == expected if self.is_complete else reused <= expected
        assert model.sequence.committed == model.sequence.history == model.sequence.capacity == reused

    @precondition(lambda self: len(self.models) < 4)
    @rule(data=st.data(), salt=st.sampled_from(SALTS), tail=TAILS)
    def reserve(self, data, salt, tail):
        model = self.open(data, salt, tail)
        expected = [self.naive.held(group, salt, model.tokens) for group in range(self.layout.num_groups)]
        held = self.cache.reserve(model.sequence, model.tokens, capacity=len(model.tokens) + 1)
        if held is None:
            assert self.num_missing(len(model.tokens)) > 0
            self.close_model(model)
            return
        for mine, theirs in zip(held, expected, strict=True):
            assert mine.tolist() == theirs if self.is_complete else set(mine.tolist()) <= set(theirs)
        model.received = [set(ordinals.tolist()) for ordinals in held]

    @precondition(lambda self: self.running())
    @rule(data=st.data(), count=st.integers(1, 9) | st.just(50))
    def chunk(self, data, count):
        self.compute(data.draw(st.sampled_from(self.running())), count)

    @precondition(lambda self: self.running())
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data, token):
        model = data.draw(st.sampled_from(self.running()))
        if model.sequence.history == len(model.tokens):
            model.tokens += (token,)
        self.compute(model, 1)

    @precondition(lambda self: self.running())
    @rule(data=st.data())
    def finish(self, data):
        model = data.draw(st.sampled_from(self.running()))
        self.compute(model, 8)
        self.compute(model, 50)
        self.prompts = [*self.prompts[-3:], model.tokens[:40]]
        self.close_model(model)

    @precondition(lambda self: self.reserved())
    @rule(data=st.data())
    def verify(self, data):
        """What was missing arrives and is right."""
        model = data.draw(st.sampled_from(self.reserved()))
        for position in range(len(model.tokens)):
            self.write(model, position, without=model.received)
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
        sequence = self.cache.open("evict", "nobody else's")
        self.cache.resize(sequence, capacity=count, history=0)
        self.cache.close_sequence(sequence)

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
        self.num_opened += 1
        model = Model(self.cache.open(self.num_opened, salt), salt, tokens)
        self.models.append(model)
        return model

    def close_model(self, model, *, wipe=False):
        self.models.remove(model)
        self.cache.close_sequence(model.sequence, wipe=wipe)

    def num_missing(self, prompt_len):
        """Most slots that the tightest pool lacks for a prompt that shares nothing."""
        short = [-pool.num_free for pool in self.cache.pools]
        for group, pool in zip(self.layout.groups, self.layout.pool_of_group, strict=True):
            last = range(-(-(prompt_len + 1) // T) * T)
            live = {t // T for t in last if readable_later(t, prompt_len, group.window, group.num_sink_tokens)}
            short[pool] += len(live)
        return max(short)

    def compute(self, model, count):
        sequence, start = model.sequence, model.sequence.history
        end = min(start + count, len(model.tokens))
        if start == end or not self.cache.resize(sequence, capacity=end, history=start):
            return
        for position in range(start, end):
            self.write(model, position)
        self.commit(model, end)
        assert self.cache.resize(sequence, capacity=end, history=end)

    def commit(self, model, end):
        sequence = model.sequence
        before = sequence.committed
        self.cache.commit(sequence, model.tokens[before:end])
        self.naive.write_down(sequence, model.salt, model.tokens, before)
        assert sequence.committed <= end
        if self.is_complete and not model.may_be_stopped:
            assert sequence.committed == end // T * T

    def distrust(self, model, ordinal):
        """One that was taken out of reach before is no longer this one: others may have computed it anew."""
        if all(node.is_dead for node in model.sequence.chain.path[ordinal : ordinal + 1]):
            return
        prefix = model.tokens[: (ordinal + 1) * T]
        self.naive.strike_out(model.salt, prefix)
        for other in self.models:
            other.may_be_stopped |= other.salt == model.salt and other.tokens[: len(prefix)] == prefix

    def value(self, model, position):
        return torch.tensor([model.tokens[position] + 1.0, position + 1000.0 * SALTS.index(model.salt)])

    def write(self, model, position, without=None):
        ordinal, offset = divmod(position, T)
        for group, table in enumerate(model.sequence.tables):
            if table[ordinal] != HOLE and not (without and ordinal in without[group]):
                self.cache.group_view(group)[int(table[ordinal]), :, :, 0, offset] = self.value(model, position)

    # --- invariants -------------------------------------------------------------------------------------------

    @invariant()
    def nothing_leaks(self):
        self.cache.check_invariants()
        used = [set() for _ in self.cache.pools]
        for model in self.models:
            for table, pool in zip(model.sequence.tables, self.layout.pool_of_group, strict=True):
                used[pool] |= set(table[table != HOLE].tolist())
        assert [len(slots) for slots in used] == [usage.num_used for usage in self.cache.usage()]

    @invariant()
    def every_query_reads_its_own_tokens(self):
        for pool in self.cache.pools:
            empty = [slot for slot in range(2, pool.num_slots) if pool.generations[slot] % 2 == 0]
            pool.memory.view(torch.float32)[empty] = float("nan")
        for model in self.models:
            readable = model.sequence.history if model.received is None else 0
            for group, spec in enumerate(self.layout.groups):
                for position in range(readable):
                    if readable_later(position, readable, spec.window, spec.num_sink_tokens):
                        slot = int(model.sequence.tables[group][position // T])
                        assert slot >= 2
                        stored = self.cache.group_view(group)[slot, :, :, 0, position % T]
                        assert (stored == self.value(model, position)).all()

    def teardown(self):
        for model in list(self.models):
            self.close_model(model)
        self.cache.check_invariants()
        assert all(usage.num_used == 0 for usage in self.cache.usage())
        self.cache.close()
