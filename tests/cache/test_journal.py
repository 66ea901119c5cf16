"""What a prefix cache registers and drops is noted in order, as far as its reader keeps up."""

from __future__ import annotations

from disagg.cache.identity import BlockHasher, token_bytes
from disagg.cache.journal import BlockDropped, BlockJournal, BlockStored, JournalRestart
from disagg.cache.prefix import PrefixNode, PrefixTree


def chain(tree: PrefixTree, count: int) -> list[PrefixNode]:
    root = tree.root("")
    assert root is not None
    return tree.extend(root, [token_bytes([number]) for number in range(count)])


def test_a_journal_that_nobody_asked_for_notes_nothing() -> None:
    tree = PrefixTree(BlockHasher(b"key", "model"), 1)
    journal = BlockJournal(tree)
    journal.store({chain(tree, 1)[0]: [0]})
    journal.drop(b"x" * 16, [0])
    assert journal.take(9) == []


def test_it_begins_with_the_whole_set_parents_first_and_goes_on_with_changes() -> None:
    tree = PrefixTree(BlockHasher(b"key", "model"), 2)
    journal = BlockJournal(tree)
    first, second, third = chain(tree, 3)
    first.slots, third.slots = [4, -1], [5, 6]
    journal.begin()
    journal.store({second: [1]})
    journal.drop(first.identity, [0])
    assert journal.take(2) == [JournalRestart(), BlockStored(first.identity, (0,), b"", first.tokens)]
    assert journal.take(9) == [
        BlockStored(third.identity, (0, 1), second.identity, third.tokens),
        BlockStored(second.identity, (1,), first.identity, second.tokens),
        BlockDropped(first.identity, (0,)),
    ]
    journal.drop(third.identity, [0])
    journal.end()
    assert journal.take(9) == []


def test_a_reader_that_does_not_keep_up_is_told_and_may_begin_anew() -> None:
    tree = PrefixTree(BlockHasher(b"key", "model"), 1)
    journal = BlockJournal(tree, max_waiting=3)
    nodes = chain(tree, 3)
    journal.begin()
    journal.store({node: [0] for node in nodes[:2]})
    assert not journal.is_lost
    journal.store({nodes[2]: [0]})
    assert journal.is_lost
    assert journal.take(9) == []
    nodes[0].slots = [1]
    journal.begin()
    assert not journal.is_lost
    assert [type(event) for event in journal.take(9)] == [JournalRestart, BlockStored]
