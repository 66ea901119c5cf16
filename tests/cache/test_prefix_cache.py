from __future__ import annotations

import pytest
import torch
from support.oracles.cache_oracle import tiny_layout

from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.table import HOLE

T = 4
PROMPT = tuple(range(100, 124))


class OneName(BlockHasher):
    """Every block after the root has one name."""

    def child(self, parent, tokens):
        return b"the same for all"


def make(*windows, room=40, hasher=None, sinks=0):
    layout = tiny_layout(*windows, block_size=T, num_sink_tokens=sinks)
    return KVCache(layout, (room,) * layout.num_pools, hasher=hasher or BlockHasher(b"key", "model"))


def compute(cache, key, tokens, *, salt="", chunk=100):
    """A sequence that has computed all of `tokens`, and how many of them it reused."""
    sequence = cache.open(key, salt)
    reused = cache.reuse_prefix(sequence, tokens)
    while sequence.history < len(tokens):
        start, end = sequence.history, min(sequence.history + chunk, len(tokens))
        assert cache.resize(sequence, capacity=end, history=start)
        for table, group in zip(sequence.tables, range(cache.layout.num_groups), strict=True):
            for position in range(start, end):
                cache.group_view(group)[int(table[position // T]), :, :, 0, position % T] = tokens[position]
        cache.commit(sequence, tokens[sequence.committed : end])
        assert cache.resize(sequence, capacity=end, history=end)
    cache.check_invariants()
    return sequence, reused


def run(cache, key, tokens, **options):
    sequence, reused = compute(cache, key, tokens, **options)
    cache.close_sequence(sequence)
    cache.check_invariants()
    return reused


def used_cached(cache):
    (usage,) = cache.usage()
    return usage.num_used, usage.num_cached


def test_a_second_prompt_computes_only_what_is_new():
    cache = make(None)
    assert run(cache, "a", PROMPT) == 0
    assert run(cache, "b", PROMPT) == 20  # the last block holds the last token
    assert run(cache, "c", (*PROMPT, 1, 2, 3, 4, 5)) == 24
    assert run(cache, "d", (*PROMPT[:9], 1, 2, 3, 4, 5)) == 8


def test_sequences_share_slots_and_count_once():
    cache = make(None)
    first, _ = compute(cache, "a", PROMPT)
    second, reused = compute(cache, "b", (*PROMPT, 7))
    assert reused == 24
    assert second.tables[0][:6].tolist() == first.tables[0].tolist()
    assert used_cached(cache) == (7, 0)
    cache.close_sequence(first)
    assert used_cached(cache) == (7, 0)
    cache.close_sequence(second)
    assert used_cached(cache) == (0, 6)  # the seventh block was never whole


def test_cached_slots_count_as_free_and_keep_their_generation_until_they_are_evicted():
    cache = make(None, room=2 + 8)
    sequence, _ = compute(cache, "a", PROMPT)
    slots = sequence.tables[0].copy()
    generations = cache.pools[0].generations[slots].copy()
    cache.close_sequence(sequence)
    (usage,) = cache.usage()
    assert (usage.num_free, usage.num_cached, usage.num_evicted) == (8, 6, 0)
    assert (cache.pools[0].generations[slots] == generations).all()
    assert run(cache, "b", range(32)) == 0  # takes all eight
    (usage,) = cache.usage()
    assert usage.num_evicted == 6
    assert (cache.pools[0].generations[slots] > generations).all()
    assert run(cache, "c", PROMPT) == 0


def test_the_deepest_block_of_a_release_is_evicted_first():
    cache = make(None, room=2 + 8)
    run(cache, "a", PROMPT)
    run(cache, "b", (1,) * 16)  # two slots were empty: four blocks are in its way... of which two are evicted
    assert run(cache, "c", (*PROMPT, 0)) == 16


def test_what_was_used_last_is_evicted_last():
    cache = make(None, room=2 + 9)
    run(cache, "a", (1,) * 16 + (0,))
    run(cache, "b", (2,) * 16 + (0,))
    run(cache, "a again", (1,) * 16 + (0,))
    run(cache, "c", (3,) * 16 + (0,))
    assert run(cache, "a", (1,) * 16 + (0,)) == 16
    assert run(cache, "b", (2,) * 16 + (0,)) < 16


def test_a_slot_in_use_is_never_evicted():
    cache = make(None, room=2 + 8)
    sequence, _ = compute(cache, "a", PROMPT)
    other = cache.open("b")
    assert not cache.resize(other, capacity=12, history=0)
    assert cache.resize(other, capacity=8, history=0)
    cache.check_invariants()
    assert (cache.group_view(0)[sequence.tables[0].tolist(), 0, 0, 0, 0, 0] == torch.tensor(PROMPT[::4])).all()


def test_giving_up_a_shared_slot_makes_no_room():
    """A window moves on over a block that somebody else still uses: the slot it leaves is not its to allocate."""
    cache = make(4, room=2 + 5)
    first, _ = compute(cache, "a", PROMPT[:8])
    second, reused = compute(cache, "b", PROMPT[:9])
    assert reused == 8
    filler = cache.open("c")
    assert cache.resize(filler, capacity=4 * cache.pools[0].num_free, history=0)
    before = cache.usage()
    assert not cache.resize(second, capacity=16, history=9 + 3)
    assert cache.usage() == before
    assert first.tables[0][1] != HOLE
    cache.check_invariants()


# --- windows --------------------------------------------------------------------------------------------------


def test_windowed_blocks_that_left_their_sequence_stay_reusable():
    cache = make(4, None)
    sequence, _ = compute(cache, "a", PROMPT, chunk=4)
    assert [int((table != HOLE).sum()) for table in sequence.tables] == [1, 6]
    assert run(cache, "b", (*PROMPT[:12], 1, 2)) == 12  # its window lies where "a" has long moved on
    cache.close_sequence(sequence)


def test_a_local_prefix_must_be_whole_in_every_group_and_a_receiver_takes_what_each_has():
    cache = make(4, 4, None)  # two layers of one window and a full one: two pools
    run(cache, "a", PROMPT, chunk=4)
    lone = cache.pools[0]
    taken = lone.allocate(lone.num_free)  # empties the windowed pool
    lone.free(taken)
    assert run(cache, "b", (*PROMPT, 1)) == 0
    run(cache, "again", PROMPT, chunk=4)
    taken = lone.allocate(lone.num_free)
    lone.free(taken)
    sequence = cache.open("c")
    held = cache.reserve(sequence, (*PROMPT, 1), capacity=26)
    assert [ordinals.tolist() for ordinals in held] == [[], [0, 1, 2, 3, 4, 5]]
    cache.check_invariants()
    # Of one windowed block each time, needed where a prompt goes on, and of 5, 6, 5 and 6 blocks of the full group.
    assert [(count.num_queried, count.num_hit) for count in cache.reuse_counts()] == [(4, 1), (22, 0 + 6 + 5 + 6)]


def test_a_windowed_block_in_the_middle_is_held_alone():
    cache = make(12)
    run(cache, "a", (*PROMPT[:20], 1))
    sequence = cache.open("b")
    held = cache.reserve(sequence, (*PROMPT[:16], 9, 9, 9, 9, 9), capacity=22)
    assert held[0].tolist() == [2, 3]


# --- imports --------------------------------------------------------------------------------------------------


def test_what_is_received_is_registered_only_when_it_is_committed():
    cache = make(None)
    sequence = cache.open("a")
    cache.reserve(sequence, PROMPT, capacity=25)
    assert sequence.committed == 0
    assert run(cache, "b", PROMPT) == 0
    cache.close_sequence(sequence)  # the transfer failed
    cache = make(None)
    sequence = cache.open("a")
    cache.reserve(sequence, PROMPT, capacity=25)
    cache.commit(sequence, PROMPT)
    assert sequence.committed == 24
    assert run(cache, "b", PROMPT) == 20
    cache.check_invariants()


def test_a_block_that_received_only_some_of_its_tokens_is_not_reused_and_the_others_are():
    """A window that begins inside a block, from a sender of finer blocks: the rest of that block never came."""
    cache = make(6, None)
    sequence = cache.open("a")
    cache.reserve(sequence, PROMPT, capacity=25)
    cache.mark_partial(sequence, [(0, 4)])
    cache.commit(sequence, PROMPT)
    assert sequence.committed == 24
    reader = cache.open("b")
    held = cache.reserve(reader, (*PROMPT[:23], 1), capacity=25)
    assert [ordinals.tolist() for ordinals in held] == [[], [0, 1, 2, 3, 4]]
    whole = cache.open("c")
    assert [ordinals.tolist() for ordinals in cache.reserve(whole, (*PROMPT, 1), capacity=26)] == [
        [5],
        [0, 1, 2, 3, 4, 5],
    ]
    cache.check_invariants()


def test_a_block_that_lacks_tokens_is_not_registered_when_generation_fills_it():
    cache = make(2, None)
    sequence = cache.open("a")
    cache.reserve(sequence, PROMPT[:22], capacity=23)
    cache.mark_partial(sequence, [(0, 5)])
    cache.commit(sequence, PROMPT[:22])
    for stored in (22, 23):
        assert cache.resize(sequence, capacity=stored + 1, history=stored)
    cache.commit(sequence, PROMPT[20:])
    assert cache.resize(sequence, capacity=24, history=24)
    assert sequence.committed == 24
    assert run(cache, "b", (*PROMPT, 1)) == 0  # the window of 24 begins in that block
    cache.check_invariants()


def test_a_reservation_without_room_changes_nothing():
    cache = make(None, room=2 + 8)
    run(cache, "a", PROMPT)
    blocker = cache.open("blocker")
    assert cache.resize(blocker, capacity=8, history=0)
    before = (cache.usage(), cache.reuse_counts())
    sequence = cache.open("b")
    assert cache.reserve(sequence, (*PROMPT, *range(8)), capacity=33) is None
    assert (cache.usage()[0].num_used, cache.reuse_counts()) == (before[0][0].num_used, before[1])
    cache.close_sequence(sequence)
    cache.check_invariants()


# --- trust ----------------------------------------------------------------------------------------------------


def test_salts_do_not_share():
    cache = make(None)
    run(cache, "a", PROMPT, salt="mine")
    assert run(cache, "b", PROMPT, salt="yours") == 0
    assert run(cache, "c", PROMPT) == 0
    assert run(cache, "d", PROMPT, salt="mine") == 20


def test_a_planted_collision_is_caught():
    cache = make(None, hasher=OneName(b"key", "model"))
    run(cache, "a", (1, 2, 3, 4, 5))
    assert run(cache, "b", (9, 9, 9, 9, 9)) == 0
    assert run(cache, "c", (1, 2, 3, 4, 6)) == 4
    assert run(cache, "d", (1, 2, 3, 4, 1, 2, 3, 4, 5)) == 4


def test_without_comparing_tokens_the_collision_would_be_reused(monkeypatch):
    """Negative control."""
    cache = make(None, hasher=OneName(b"key", "model"))
    run(cache, "a", (1, 2, 3, 4, 5))
    monkeypatch.setattr(cache.prefixes.tree, "_find", lambda name, parent, tokens: cache.prefixes.tree._nodes.get(name))
    sequence = cache.open("b")
    assert cache.reuse_prefix(sequence, (9, 9, 9, 9, 9)) == 4


def test_an_unregistered_block_takes_all_that_extends_it_along():
    cache = make(None)
    run(cache, "other", (*PROMPT[:12], 1, 2, 3, 4, 5))
    sequence, _ = compute(cache, "a", PROMPT)
    assert cache.unregister(sequence, 1) == 6  # blocks 1 to 5 of its own and one of the other's
    cache.check_invariants()
    assert run(cache, "b", PROMPT) == 4
    assert run(cache, "c", (*PROMPT[:12], 1, 2, 3, 4, 5)) == 12  # recomputed meanwhile, by "b"
    cache.close_sequence(sequence)
    cache.check_invariants()


def test_what_was_unregistered_is_not_registered_again_by_who_still_holds_it():
    cache = make(None)
    sequence, _ = compute(cache, "a", PROMPT)
    reserved = cache.open("r")
    cache.reserve(reserved, PROMPT, capacity=25)
    cache.unregister(sequence, 0)
    cache.commit(reserved, PROMPT)
    assert reserved.committed == 0
    assert not reserved.is_committing
    assert run(cache, "b", PROMPT) == 0
    cache.close_sequence(sequence)
    cache.close_sequence(reserved)
    cache.check_invariants()


@pytest.mark.parametrize("first", [0, 1])
def test_a_sequence_that_may_not_be_finite_leaves_nothing_behind(first):
    cache = make(None)
    sequences = [compute(cache, "a", PROMPT)[0], compute(cache, "b", (*PROMPT, 5))[0]]
    cache.close_sequence(sequences[first], wipe=True)
    cache.close_sequence(sequences[1 - first])
    assert run(cache, "c", PROMPT) == 0
    cache = make(None)
    sequence, _ = compute(cache, "a", PROMPT)
    slots = sequence.tables[0].tolist()
    cache.close_sequence(sequence, wipe=True)
    assert not cache.pools[0].memory[slots].any()
    assert used_cached(cache) == (0, 0)


def test_without_a_hasher_nothing_is_kept():
    layout = tiny_layout(None, block_size=T)
    cache = KVCache(layout, (20,))
    assert run(cache, "a", PROMPT) == run(cache, "b", PROMPT) == 0
    assert used_cached(cache) == (0, 0)
    assert cache.reuse_counts() == ()


@pytest.mark.parametrize("fault", ["reference", "registered", "owner"])
def test_check_invariants_notices(fault):
    cache = make(None)
    sequence, _ = compute(cache, "a", PROMPT)
    slot = int(sequence.tables[0][0])
    if fault == "reference":
        cache.pools[0].retain(sequence.tables[0][:1])
    elif fault == "registered":
        cache.resize(sequence, capacity=25, history=24)
        cache.pools[0].register([int(sequence.tables[0][6])])
    else:
        cache.prefixes._forget(0, [slot])
    with pytest.raises(AssertionError):
        cache.check_invariants()
