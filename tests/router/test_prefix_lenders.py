"""What the router remembers of prompts, and which sources it leaves alone."""

from __future__ import annotations

import random

from disagg.router.back_off import FIRST_S, MAX_S, BackOff
from disagg.router.prefix_memory import MAX_HOLDERS, PrefixMemory, Remembered

A = (b"a1", b"a2", b"a3")


def test_a_longer_prompt_finds_who_has_its_beginning_and_what_followed() -> None:
    memory = PrefixMemory()
    memory.note("d0", A, 60)
    memory.note("p0", A, 50)
    assert memory.holders((*A, b"a4"), 16) == [Remembered("d0", 60), Remembered("p0", 50)]


def test_of_another_prompt_only_what_both_begin_with_counts() -> None:
    memory = PrefixMemory()
    memory.note("d0", A, 60)
    assert memory.holders((b"a1", b"x2"), 16) == [Remembered("d0", 16)]
    assert memory.holders((b"x1",), 16) == []


def test_what_a_worker_turned_out_not_to_have_is_forgotten() -> None:
    memory = PrefixMemory()
    memory.note("d0", A, 60)
    memory.drop("d0", (*A, b"a4"))
    assert memory.holders(A, 16) == []
    assert len(memory) == 0


def test_memory_is_bounded_the_oldest_goes_first() -> None:
    memory = PrefixMemory(max_names=3)
    memory.note("d0", A, 60)
    memory.note("d1", (b"b1",), 10)
    assert len(memory) == 3
    assert memory.holders((b"a1",), 16) == []
    assert memory.holders((b"b1",), 16) == [Remembered("d1", 16)]


def test_a_name_has_few_holders_the_last_ones() -> None:
    memory = PrefixMemory()
    for number in range(2 * MAX_HOLDERS):
        memory.note(f"d{number}", A, 60)
    holders = memory.holders(A, 16)
    assert len(holders) == MAX_HOLDERS
    assert holders[-1].incarnation == f"d{2 * MAX_HOLDERS - 1}"


def test_the_memory_says_what_a_list_of_all_that_was_noted_says() -> None:
    """An oracle that keeps everything, on random prompts of a small tree."""
    rng = random.Random(3)
    memory, noted = PrefixMemory(), []
    for _ in range(200):
        chain = tuple(str(rng.randrange(2)) * (depth + 1) for depth in range(rng.randrange(1, 5)))
        names = tuple("".join(chain[: depth + 1]).encode() for depth in range(len(chain)))
        worker, beyond = f"w{rng.randrange(3)}", len(names) * 16 + rng.randrange(16)
        memory.note(worker, names, beyond)
        noted.append((worker, names, beyond))
        asked = noted[rng.randrange(len(noted))][1]
        for one in memory.holders(asked, 16):
            common = max(shared(asked, names) for who, names, _ in noted if who == one.incarnation)
            assert common * 16 <= one.num_tokens <= common * 16 + 15 + 16 * 4


def shared(a: tuple[bytes, ...], b: tuple[bytes, ...]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_source_is_left_alone_after_two_failures_in_a_row_for_longer_each_time() -> None:
    back_off, now = BackOff(), 100.0
    back_off.failed("s", now)
    assert back_off.may_ask("s", now)
    pause = FIRST_S
    for _ in range(10):
        back_off.failed("s", now)
        assert not back_off.may_ask("s", now + pause - 0.01)
        assert back_off.may_ask("s", now + pause)
        now += pause
        pause = min(2 * pause, MAX_S)
    assert pause == MAX_S


def test_a_source_that_delivers_starts_with_a_clean_slate() -> None:
    back_off = BackOff()
    back_off.failed("s", 0.0)
    back_off.succeeded("s")
    back_off.failed("s", 0.0)
    assert back_off.may_ask("s", 0.0)
    back_off.failed("s", 0.0)
    back_off.forget("s")
    assert back_off.may_ask("s", 0.0)
