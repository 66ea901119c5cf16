"""Chats over a fleet in one process: each turn computes what is new, wherever the turns before it lie."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support.links.shell_fleet import ShellFleet, fleet
from support.model.engine_pair import LAYOUT, prompt_of

SIZE = LAYOUT.block_size


def run(story: Callable[[ShellFleet], Coroutine[Any, Any, None]], plane: str = "inproc", **options: Any) -> None:
    async def scenario() -> None:
        async with fleet(plane, **options) as running:
            await story(running)

    asyncio.run(scenario())


def whole_blocks(num_tokens: int) -> int:
    return num_tokens // SIZE * SIZE


async def turn(f: ShellFleet, prompt: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """(what the client has then, prompt tokens that were computed for it)."""
    before = f.num_computed()
    answer = await f.ask(prompt)
    await f.settle()
    return (*prompt, *answer), f.num_computed() - before


@pytest.mark.parametrize("plane", ["inproc", "shm", "tcp"])
def test_three_turns_at_random_places_compute_only_what_is_new(plane: str) -> None:
    async def story(f: ShellFleet) -> None:
        rng = random.Random(7)
        for chat in range(4):
            history: tuple[int, ...] = ()
            for number in range(3):
                f.at_random(rng)
                prompt = (*history, *prompt_of(18 if not number else 7, 10 * chat + number))
                stored = max(0, len(history) - 1)
                history, computed = await turn(f, prompt)
                assert computed == len(prompt) - whole_blocks(stored), (chat, number, f.forced)
        assert f.counted("disagg_transfers_total", purpose="prefix", outcome="verified") > 0

    run(story, plane)
