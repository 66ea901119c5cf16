"""The arena itself: a story is told again when its loop stood still, never when anything in it was wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.faults.wrong import Wrong
from support.links.shell_pair import ShellTrio

PAUSE_S = 0.15
MAX_TRIES = 4
PLANE = pytest.mark.parametrize(("plane", "scale"), [("inproc", 0.2)])


def stand_still() -> None:
    time.sleep(PAUSE_S)


def num_tellings(arena: Any, fail: Callable[[ShellTrio], None]) -> int:
    """How often the arena tells a story in which the loop stands still and which then fails."""
    told: list[ShellTrio] = []

    async def story(trio: ShellTrio) -> None:
        told.append(trio)
        await asyncio.sleep(0.05)  # the loop is being watched
        stand_still()
        await asyncio.sleep(0.05)
        fail(trio)

    with pytest.raises((AssertionError, ExceptionGroup)):
        arena.run(story)
    return len(told)


def late(trio: ShellTrio) -> None:
    raise AssertionError("the answer took 6 s")


def wrong(trio: ShellTrio) -> None:
    raise Wrong("a wrong answer")


def wrong_in_a_group(trio: ShellTrio) -> None:
    raise ExceptionGroup("clients", [AssertionError("late"), Wrong("a wrong answer")])


def late_after_wrong_bytes(trio: ShellTrio) -> None:
    trio.decode.wrong.append("group 0, block 1 is not what was sent")
    raise AssertionError("the answer took 6 s")


def late_after_a_second_release(trio: ShellTrio) -> None:
    key: Any = "an attempt"
    trio.prefill.count_once("release", trio.prefill.releases, key)
    trio.prefill.count_once("release", trio.prefill.releases, key)
    raise AssertionError("the answer took 6 s")


@PLANE
def test_a_story_that_was_late_on_a_machine_that_stood_still_is_told_again(arena: Any) -> None:
    assert num_tellings(arena, late) == MAX_TRIES


@PLANE
@pytest.mark.parametrize("fail", [wrong, wrong_in_a_group, late_after_wrong_bytes, late_after_a_second_release])
def test_a_story_in_which_anything_was_wrong_is_told_once(arena: Any, fail: Callable[[ShellTrio], None]) -> None:
    assert num_tellings(arena, fail) == 1


@PLANE
def test_slots_that_are_never_given_back_are_not_late(arena: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.links.shell_pair.LEAKED_S", 0.1)
    monkeypatch.setattr(ShellTrio, "leftovers", lambda self: {"decode": {"slots": 1}})
    tellings = []

    async def story(trio: ShellTrio) -> None:
        tellings.append(trio)
        stand_still()
        await trio.settle()

    with pytest.raises(Wrong, match="left behind"):
        arena.run(story)
    assert len(tellings) == 1
