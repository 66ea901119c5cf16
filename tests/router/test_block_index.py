"""The index answers as plain sets of (worker, group, block) would, through gaps, restarts and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from disagg.cache.journal import BlockDropped, BlockEvent, BlockStored, JournalRestart
from disagg.cache.window import needed_ordinals, stale_range
from disagg.router.index.block_index import BlockIndex, GroupSpan, Holder
from disagg.router.index.sliding import SlidingAnd
from disagg.transceiver.wire.messages.blocks import BlockEvents
from disagg.worker.block_news import events_message

FULL, WINDOW, SINKS = GroupSpan(None), GroupSpan(7), GroupSpan(6, 5)
GROUPS = (FULL, WINDOW, SINKS)
T = 4


def name(path: Sequence[int]) -> bytes:
    return blake2b(bytes(path), digest_size=16).digest()


def chain_of(path: Sequence[int]) -> list[bytes]:
    return [name(path[: end + 1]) for end in range(len(path))]


def stored(path: Sequence[int], groups: Sequence[int]) -> BlockStored:
    parent = name(path[:-1]) if len(path) > 1 else b""
    return BlockStored(name(path), tuple(groups), parent, bytes(8 * T))


def plain_holders(
    held: dict[str, set[tuple[int, bytes]]], chain: Sequence[bytes], groups: Sequence[GroupSpan]
) -> dict[str, int]:
    """By worker, the longest boundary at which each group has every block that is not stale there."""
    found = {}
    for worker, pairs in held.items():
        for count in range(len(chain), 0, -1):
            if all(
                (group, chain[ordinal]) in pairs
                for group, span in enumerate(groups)
                for ordinal in range(count)
                if ordinal not in stale_range(count * T, span.window, span.num_sink_tokens, T)
            ):
                found[worker] = count * T
                break
    return found


def as_dict(holders: Sequence[Holder]) -> dict[str, int]:
    return {holder.incarnation: holder.num_tokens for holder in holders}


class IndexMachine(RuleBasedStateMachine):
    """Three workers register and drop blocks of a small tree; messages are lost, workers restart and go."""

    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(GROUPS)
        self.held: dict[str, set[tuple[int, bytes]]] = {}
        """What each worker really holds."""
        self.known: dict[str, bool] = {}
        """Whether the index has all that this worker told."""
        self.sequence: dict[str, int] = {}

    def say(self, worker: str, events: Sequence[BlockEvent], *, is_lost: bool = False) -> None:
        message = events_message(worker, self.sequence[worker], T, events)
        self.sequence[worker] += 1
        if is_lost:
            return
        was_in_step = self.known[worker]
        answer = self.index.take(message)
        if message.is_reset:
            self.known[worker] = True
            assert answer
        elif was_in_step and not answer:
            self.known[worker] = False
        else:
            assert answer, "a gap is told once"

    @rule(worker=st.sampled_from("abc"))
    def begin(self, worker: str) -> None:
        self.index.add(worker, T)
        self.held[worker], self.known[worker], self.sequence[worker] = set(), False, 0
        self.say(worker, [JournalRestart()])

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        path=st.lists(st.integers(0, 1), min_size=1, max_size=6),
        groups=st.sets(st.integers(0, 2), min_size=1),
        is_lost=st.sampled_from([False, False, False, True]),
    )
    def store(self, data: st.DataObject, path: list[int], groups: set[int], is_lost: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.held)))
        events = [stored(path[: end + 1], sorted(groups)) for end in range(len(path))]
        self.held[worker] |= {(group, event.identity) for event in events for group in groups}
        self.note(worker, events, is_lost=is_lost)

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), is_lost=st.sampled_from([False, False, False, True]))
    def drop(self, data: st.DataObject, is_lost: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(w for w, pairs in self.held.items() if pairs)))
        group, identity = data.draw(st.sampled_from(sorted(self.held[worker])))
        self.held[worker].discard((group, identity))
        self.note(worker, [BlockDropped(identity, (group,))], is_lost=is_lost)

    def note(self, worker: str, events: Sequence[BlockEvent], *, is_lost: bool) -> None:
        self.say(worker, events, is_lost=is_lost)
        if is_lost and self.known[worker]:
            self.say(worker, [])  # the next message shows the gap
            assert not self.known[worker]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def tell_all(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.held)))
        blocks: dict[bytes, list[int]] = {}
        for group, identity in sorted(self.held[worker]):
            blocks.setdefault(identity, []).append(group)
        self.say(worker, [JournalRestart(), *(BlockStored(i, tuple(g), b"", b"") for i, g in blocks.items())])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.held)))
        self.index.remove(worker)
        del self.held[worker], self.known[worker], self.sequence[worker]

    @rule()
    def sweep(self) -> None:
        self.index.sweep()

    @invariant()
    def answers_as_plain_sets_do(self) -> None:
        self.index.check_invariants()
        held = {worker: pairs for worker, pairs in self.held.items() if self.known[worker]}
        for path in ([0] * 6, [0, 1, 0, 1, 0, 1], [1, 1, 0], [1]):
            chain = chain_of(path)
            found = self.index.holders(chain, T, 10)
            assert as_dict(found) == plain_holders(held, chain, GROUPS)
            assert [h.num_tokens for h in found] == sorted((h.num_tokens for h in found), reverse=True)


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_the_index_answers_as_plain_sets_through_gaps_restarts_and_losses = IndexMachine.TestCase


spans = st.sampled_from([FULL, WINDOW, SINKS, GroupSpan(1), GroupSpan(9, 1), GroupSpan(3, 9)])
missing = st.sets(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=3)
"""Few (group, ordinal) pairs: a boundary hangs on single blocks."""


@settings(max_examples=400, deadline=None)
@given(st.lists(spans, min_size=1, max_size=3), st.lists(missing, min_size=1, max_size=3))
def test_a_boundary_needs_each_block_that_is_attended_to_behind_it_and_no_other(
    groups: list[GroupSpan], without: list[set[tuple[int, int]]]
) -> None:
    index, chain, held = BlockIndex(groups), chain_of([0] * 10), {}
    for number, missed in enumerate(without):
        worker = f"w{number}"
        held[worker] = {
            (group, chain[ordinal])
            for group in range(len(groups))
            for ordinal in range(10)
            if (group, ordinal) not in missed
        }
        index.add(worker, T)
        dropped = [BlockDropped(chain[ordinal], (group,)) for group, ordinal in missed if group < len(groups)]
        stores = [stored([0] * (end + 1), range(len(groups))) for end in range(10)]
        index.take(events_message(worker, 0, T, [JournalRestart(), *stores, *dropped]))
    assert as_dict(index.holders(chain, T, 10)) == plain_holders(held, chain, groups)


def filled(groups: Sequence[GroupSpan] = GROUPS) -> BlockIndex:
    index = BlockIndex(groups)
    index.add("a", T)
    index.take(events_message("a", 0, T, [JournalRestart()]))
    return index


def test_without_sweeping_a_number_is_not_used_again_and_with_it_blocks_are_forgotten() -> None:
    index = filled()
    index.take(events_message("a", 1, T, [stored([0], [0, 1, 2])]))
    index.remove("a")
    index.add("b", T)
    assert index.holders(chain_of([0]), T, 5) == []
    assert len(index) == 1
    while index.sweep():
        pass
    assert len(index) == 0
    index.add("c", T)
    index.check_invariants()


def test_only_workers_of_the_block_size_asked_for_are_named_and_no_more_than_wanted() -> None:
    index = BlockIndex([FULL])
    for worker, block_size in (("a", 4), ("b", 4), ("c", 8)):
        index.add(worker, block_size)
        index.take(events_message(worker, 0, block_size, [JournalRestart(), stored([0], [0])]))
    assert index.block_sizes == (4, 8)
    assert as_dict(index.holders(chain_of([0]), 4, 5)) == {"a": 4, "b": 4}
    assert len(index.holders(chain_of([0]), 4, 1)) == 1
    assert as_dict(index.holders(chain_of([0]), 8, 5)) == {"c": 8}


def test_a_chain_is_read_only_as_far_as_any_worker_holds_it() -> None:
    index = filled()
    index.take(events_message("a", 1, T, [stored([0], [0, 1, 2])]))
    read = []

    def chain() -> Callable[[], None]:  # type: ignore[misc]
        for identity in chain_of([0] * 100):
            read.append(identity)
            yield identity

    assert as_dict(index.holders(chain(), T, 5)) == {"a": 4}  # type: ignore[arg-type]
    assert len(read) == 2


def test_a_worker_that_names_groups_or_blocks_its_model_does_not_have_is_passed_over() -> None:
    for message in (
        events_message("a", 1, T, [stored([0], [3])]),
        events_message("a", 1, 2 * T, [stored([0], [0])]),
    ):
        index = filled()
        assert index.take(message)
        assert index.block_sizes == ()
        index.check_invariants()


def test_messages_of_workers_that_are_not_registered_change_nothing() -> None:
    index = BlockIndex([FULL])
    assert index.take(events_message("x", 5, T, [stored([0], [0])]))
    assert len(index) == 0


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3)), max_size=30))
def test_the_sliding_and_is_that_of_the_entries_left(script: list[tuple[int, int]]) -> None:
    sliding, entries, first = SlidingAnd(), list[int](), 0
    for bits, step in script:
        entries.append(bits)
        sliding.push(bits)
        first = min(len(entries), first + step)
        sliding.drop_before(first)
        expected = -1
        for entry in entries[first:]:
            expected &= entry
        assert sliding.value == expected


def test_the_oracle_knows_what_a_transfer_needs() -> None:
    for count in range(1, 9):
        for span in GROUPS:
            kept = set(range(count)) - set(stale_range(count * T, span.window, span.num_sink_tokens, T))
            needed = set(needed_ordinals(count * T, span.window, span.num_sink_tokens, T).tolist())
            assert needed <= kept


events = st.lists(
    st.one_of(
        st.builds(BlockDropped, st.binary(min_size=16, max_size=16), st.sampled_from([(0,), (1,), (0, 1)])),
        st.builds(
            BlockStored,
            st.binary(min_size=16, max_size=16),
            st.sampled_from([(0,), (0, 1)]),
            st.sampled_from([b"", b"p" * 16]),
            st.just(bytes(8 * T)),
        ),
    ),
    max_size=20,
)


@given(events, st.booleans(), st.booleans())
def test_a_message_says_each_event_with_its_parent(some: list[BlockEvent], is_reset: bool, with_tokens: bool) -> None:
    message = events_message("a", 3, T, [*([JournalRestart()] if is_reset else []), *some], with_tokens)
    assert (message.sequence, message.is_reset) == (3, is_reset)
    assert read_back(message) == [
        (e.identity, e.groups, e.parent if isinstance(e, BlockStored) else None)
        for e in some
        if not isinstance(e, JournalRestart)
    ]


def read_back(message: BlockEvents) -> list[tuple[bytes, tuple[int, ...], bytes | None]]:
    found: list[tuple[bytes, tuple[int, ...], bytes | None]] = []
    parents = [message.parents[at : at + 16] for at in range(0, len(message.parents), 16)]
    for number, op in enumerate(message.ops):
        identity = message.identities[16 * number : 16 * number + 16]
        parent = [None, found[-1][0] if found else b"?", parents[0] if parents else b"?", b""][op % 4]
        if op % 4 == 2:
            parents.pop(0)
        found.append((identity, message.group_sets[op // 4], parent))
    return found


def test_a_message_whose_columns_do_not_fit_is_refused() -> None:
    good = events_message("a", 0, T, [stored([0], [0]), stored([0, 1], [0])], True)
    for fields in (
        {"ops": good.ops[:1]},
        {"identities": good.identities[:-1]},
        {"parents": b"x"},
        {"tokens": good.tokens[:-4]},
        {"ops": bytes([4, 4])},
    ):
        values = {slot: getattr(good, slot) for slot in BlockEvents.__slots__} | fields
        with pytest.raises(ValueError, match="expected"):
            BlockEvents(**values)  # type: ignore[arg-type]
