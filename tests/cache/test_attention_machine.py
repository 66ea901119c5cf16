"""In every state that the prefix machine reaches, attention over the paged cache equals attention over plain tokens.

Each chunk and each decoded token is written and attended to by the kernels that workers use; every slot that is
nobody's holds NaN meanwhile.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from support.cache_oracle import attends
from support.prefix_machine import Model, PrefixMachine, T

from disagg.kernels import ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.workspace import Workspace

SCALE = 1e-2  # of values up to a few thousand: no softmax is all one key


def dense(values, first_query, queries, group):
    """float64 [n, 2]: what queries at `first_query`, ... read of `values` [tokens, 2], each key its own value."""
    rows = []
    for position, query in enumerate(queries, start=first_query):
        seen = [key for key in range(position + 1) if attends(position, key, group.window, group.num_sink_tokens)]
        scores = values[seen] @ query * SCALE
        weights = np.exp(scores - scores.max())
        rows.append(weights @ values[seen] / weights.sum())
    return np.array(rows)


class AttentionMachine(PrefixMachine):
    def __init__(self):
        super().__init__()
        self.rng, self.workspace = np.random.default_rng(5), Workspace()

    def compute(self, model, count):
        sequence, start = model.sequence, model.sequence.history
        end = min(start + count, len(model.tokens))
        if start == end or not self.cache.resize(sequence, capacity=end, history=start):
            return
        self.spoil_empty_slots()
        values = torch.stack([self.value(model, position) for position in range(end)])
        for number, (group, table) in enumerate(zip(self.layout.groups, sequence.tables, strict=True)):
            run = QueryRun(table, start, end - start)
            batch = PagedBatch((run,), T, group.window, group.num_sink_tokens)
            for layer in range(len(group.layers)):
                pool = self.cache.group_view(number)[:, layer]
                self.attend(batch, pool, values, start, group)
        self.commit(model, end)
        assert self.cache.resize(sequence, capacity=end, history=end)

    def attend(self, batch, pool, values, start, group):
        plan = ops.plan(batch, pool, torch.float32, self.workspace)
        new = values[start:, None]
        ops.write_kv(pool, plan, new, new)
        queries = self.rng.standard_normal((len(values) - start, 2)) * [1, SCALE]
        found = ops.paged_attention(torch.from_numpy(queries).float()[:, None], pool, plan, scale=SCALE)
        expected = dense(values.double().numpy(), start, queries, group)
        np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-4)

    def spoil_empty_slots(self):
        for pool in self.cache.pools:
            empty = [slot for slot in range(2, pool.num_slots) if pool.generations[slot] % 2 == 0]
            pool.memory.view(torch.float32)[empty] = float("nan")


TestAttentionMachine = AttentionMachine.TestCase
TestAttentionMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_the_machine_notices_a_window_off_by_one(monkeypatch):
    """Negative control: attention that reads one token too many is not what the tokens say."""
    machine = AttentionMachine()
    model = Model(machine.cache.open(0), "", tuple(range(20)))
    machine.models.append(model)
    plan = ops.plan
    monkeypatch.setattr(ops, "plan", lambda batch, *rest: plan(replace(batch, window=(batch.window or 99) + 1), *rest))
    with pytest.raises(AssertionError, match="Not equal"):
        machine.compute(model, 20)
    machine.teardown()
