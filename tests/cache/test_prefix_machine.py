"""Any order of admit, chunk, decode, fork, import, evict, preempt and cancel, with scratch, beside a naive cache."""

from __future__ import annotations

import pytest
from hypothesis import settings
from support.oracles.prefix_machine import PrefixMachine, T

from disagg.cache.identity import BlockHasher
from disagg.cache.pool import SlotPool
from disagg.cache.prefix import PrefixTree


class WeakHasher(BlockHasher):
    """Three bits of name: different blocks have one all the time."""

    def _hash(self, *parts):
        return super()._hash(*parts)[:1].translate(bytes(byte % 8 for byte in range(256)))


class CollidingMachine(PrefixMachine):
    hasher_class = WeakHasher
    is_complete = False


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCollidingMachine = CollidingMachine.TestCase
TestCollidingMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def admit_all(machine):
    """Prompts that begin with each of the sixteen blocks that there are; eight names for them."""
    for number in range(16):
        model = machine.add("", (*(number >> bit & 1 for bit in range(T)), 1))
        machine.reuse(model)
        machine.compute(model, T + 1)
        machine.every_query_reads_its_own_tokens()
        machine.close_model(model)


def test_names_that_collide_change_no_token():
    machine = CollidingMachine()
    admit_all(machine)
    machine.teardown()


def test_without_comparing_tokens_the_machine_would_read_others(monkeypatch):
    """Negative control: a name alone finds a block."""
    monkeypatch.setattr(PrefixTree, "_find", lambda tree, name, parent, tokens: tree._nodes.get(name))
    with pytest.raises(AssertionError, match="another token"):
        admit_all(CollidingMachine())


def come_back(machine):
    """Three prompts, of which the pools keep less than all; then each again."""
    prompts = [(number, *range(60)) for number in range(3)]
    for prompt in prompts:
        model = machine.add("", prompt)
        machine.reuse(model)
        machine.compute(model, 61)
        machine.close_model(model)
    for prompt in prompts:
        machine.reuse(machine.add("", prompt))
    machine.what_is_kept_is_what_the_naive_cache_keeps()


def test_the_least_recently_used_and_deepest_goes_first():
    machine = PrefixMachine()
    come_back(machine)
    machine.teardown()


def test_the_machine_notices_another_order_of_eviction(monkeypatch):
    """Negative control: of one release the first blocks go before the deepest."""
    free = SlotPool.free
    monkeypatch.setattr(SlotPool, "free", lambda pool, slots, wipe=False: free(pool, slots[::-1], wipe=wipe))
    with pytest.raises(AssertionError):
        come_back(PrefixMachine())
