"""In every state that the prefix machine reaches, attention over the paged cache equals attention over plain tokens.

Each chunk and each decoded token is written and attended to by the kernels that workers use, layer by layer and with
scratch slots in some examples; every slot that is nobody's holds NaN meanwhile.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from support.oracles.cache_oracle import attends
from support.oracles.prefix_machine import PrefixMachine, T

from disagg.cache.scratch import Scratch
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

    def run_layer(self, model, group, layer, start, end):
        spec, pool = self.layout.groups[group], self.cache.page_view(group)
        run = QueryRun(self.pages(model, group, layer), start, end - start)
        plan = ops.plan(PagedBatch((run,), T, spec.window, spec.num_sink_tokens), pool, torch.float32, self.workspace)
        values = torch.stack([self.value(model, position, layer) for position in range(end)])
        new = values[start:, None]
        ops.write_kv(pool, plan, new, new)
        queries = self.rng.standard_normal((end - start, 2)) * [1, SCALE]
        found = ops.paged_attention(torch.from_numpy(queries).float()[:, None], pool, plan, scale=SCALE)
        expected = dense(values.double().numpy(), start, queries, spec)
        np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-4)


TestAttentionMachine = AttentionMachine.TestCase
TestAttentionMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


def test_the_machine_notices_a_window_off_by_one(monkeypatch):
    """Negative control: attention that reads one token too many is not what the tokens say."""
    machine = AttentionMachine()
    model = machine.add("", tuple(range(20)))
    plan = ops.plan
    monkeypatch.setattr(ops, "plan", lambda batch, *rest: plan(replace(batch, window=(batch.window or 99) + 1), *rest))
    with pytest.raises(AssertionError, match="Not equal"):
        machine.compute(model, 20)
    machine.teardown()


def test_the_machine_notices_scratch_blocks_on_one_page(monkeypatch):
    """Negative control: every scratch block where the first one lies."""
    machine = AttentionMachine()
    machine.build(uses_scratch=True)
    model = machine.add("", tuple(range(24)))
    monkeypatch.setattr(Scratch, "pages", lambda self, pages: np.full(self.num_blocks, self.slots[0] * pages, np.int32))
    with pytest.raises(AssertionError, match="Not equal"):
        machine.compute(model, 24, 0)
    machine.teardown()
