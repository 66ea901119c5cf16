"""Chats over a fleet in one process: each turn computes what is new, wherever the turns before it lie."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
from support.links.shell_fleet import ShellFleet, fleet
from support.links.shell_pair import until
from support.model.engine_pair import LAYOUT, prompt_of
from support.oracles.cache_oracle import needed_blocks, tiny_layout

from disagg.cache.layout import CacheLayout
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.messages import peer as p
from disagg.worker import put_off

SIZE = LAYOUT.block_size


def run(story: Callable[[ShellFleet], Coroutine[Any, Any, None]], plane: str = "inproc", **options: Any) -> None:
    async def scenario() -> None:
        async with fleet(plane, **options) as running:
            await story(running)

    asyncio.run(scenario())


def resized(block_size: int) -> CacheLayout:
    return tiny_layout(6, 6, None, 11, block_size=block_size, num_sink_tokens=3, max_model_len=200)


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


def least_nbytes(boundary: int, held: dict[int, set[int]] | None = None) -> int:
    """By the oracle: what is needed from the boundary on, less what the sink holds."""
    total = 0
    for number, group in enumerate(LAYOUT.groups):
        needed = set(needed_blocks(boundary, group.window, group.num_sink_tokens, SIZE))
        total += len(needed - (held or {}).get(number, set())) * group.slot_nbytes(SIZE)
    return total


async def first_turn(f: ShellFleet, *, salt: int = 1, length: int = 22) -> tuple[int, ...]:
    f.forced = "d0", "p0"
    history, _ = await turn(f, prompt_of(length, salt))
    return history


@pytest.mark.parametrize("plane", ["inproc", "shm", "zmq", "tcp"])
def test_bytes_of_a_prefix_are_the_minimum(plane: str) -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        boundary = whole_blocks(len(history) - 1)
        f.forced = "d0", "p1"
        await turn(f, (*history, *prompt_of(5, 9)))
        assert f.counted("disagg_transfer_bytes_total", purpose="prefix") == least_nbytes(boundary)
        assert f.counted("disagg_transfers_total", purpose="prefix", outcome="verified") == 1

    run(story, plane)


def test_a_sink_that_has_the_prompt_fetches_the_answer_alone() -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        boundary = whole_blocks(len(history) - 1)
        f.forced = "d0", "p0"
        _, computed = await turn(f, (*history, *prompt_of(5, 9)))
        assert computed == len(history) + 5 - boundary
        own = whole_blocks(22) // SIZE
        held = {number: set(range(own)) for number in range(LAYOUT.num_groups)}
        assert f.counted("disagg_transfer_bytes_total", purpose="prefix") == least_nbytes(boundary, held)

    run(story)


@pytest.mark.parametrize("sizes", [(4, 8), (8, 4)])
def test_workers_of_unequal_block_sizes_fetch_up_to_a_common_boundary(sizes: tuple[int, int]) -> None:
    layouts = {"p1": resized(sizes[0]), "d0": resized(sizes[1]), "d1": resized(sizes[1]), "p0": resized(sizes[1])}

    async def story(f: ShellFleet) -> None:
        history = await first_turn(f, length=37)
        boundary = (len(history) - 1) // 8 * 8
        f.forced = "d0", "p1"
        _, computed = await turn(f, (*history, *prompt_of(11, 9)))
        assert computed == len(history) + 11 - boundary
        assert f.counted("disagg_transfers_total", purpose="prefix", outcome="verified") == 1

    run(story, layouts=layouts)


def test_a_source_that_has_evicted_it_answers_so_and_the_prompt_is_computed() -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        for number in range(4):
            f.forced = "d0", "p0"
            await turn(f, prompt_of(60, 20 + number))
        f.forced = "d1", "p1"
        prompt = (*history, *prompt_of(5, 9))
        _, computed = await turn(f, prompt)
        assert computed == len(prompt)
        ended = f.counted("disagg_transfers_total", purpose="prefix")
        assert ended == 1, "the source was asked, and had nothing"
        assert f.counted("disagg_transfer_bytes_total", purpose="prefix") == 0

    run(story, num_slots={"d0": (26, 38), "p0": (26, 38)})


def test_a_holder_that_died_is_not_asked() -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        await f.kill("d0")
        await until(lambda: len(f.router.cluster.registry) == 3, "its loss is known")
        f.forced = "d1", "p1"
        prompt = (*history, *prompt_of(5, 9))
        _, computed = await turn(f, prompt)
        assert computed == len(prompt) - whole_blocks(22), "the prefill worker of the first turn has its prompt"

    run(story)


def test_a_holder_that_dies_while_it_is_asked_costs_a_computation() -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        control = f.links["d0"].control
        control.hold = lambda direction, message: direction == "down"
        f.forced = "d1", "p1"
        prompt = (*history, *prompt_of(5, 9))
        before = f.num_computed()
        asking = asyncio.create_task(f.ask(prompt))
        await until(lambda: control.last("up", p.Fetch), "the source was asked")
        computed_there = f.workers["d0"].engine.stats().prompt_tokens_computed
        await f.kill("d0")
        await asking
        assert f.num_computed() - before + computed_there == len(prompt)
        assert len(f.record()["attempts"]) == 1

    run(story)


def test_a_source_that_says_nothing_delays_a_prompt_by_its_share_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        monkeypatch.setattr(put_off, "TIMES_ESTIMATE", 0.1)
        f.links["d0"].control.hold = lambda direction, message: direction == "down"
        f.forced = "d1", "p1"
        prompt = (*history, *prompt_of(5, 9))
        began_at = time.monotonic()
        before = f.num_computed()
        await f.ask(prompt)
        assert time.monotonic() - began_at < 3.0
        assert f.num_computed() - before == len(prompt)
        f.links["d0"].control.release()
        await f.settle()
        assert f.counted("disagg_transfers_total", purpose="prefix", outcome="late") == 1

    run(story)


@pytest.mark.parametrize("kind", [p.Fetch, p.Accepted, p.Slice, p.Done])
def test_a_message_that_arrives_cut_short_costs_nothing_but_time(kind: type) -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        control = f.links["d0"].control
        direction = "up" if kind is p.Fetch else "down"
        control.hold = lambda way, message: way == direction and isinstance(message, kind)
        f.forced = "d1", "p1"
        asking = asyncio.create_task(f.ask((*history, *prompt_of(5, 9))))
        await until(lambda: control.is_holding(kind), "it is on its way")
        control.arm("truncated")
        control.release()
        await asking
        assert control.num_fired == 1

    run(story)


def test_tenants_do_not_share_prefixes() -> None:
    async def story(f: ShellFleet) -> None:
        f.forced = "d0", "p0"
        prompt = prompt_of(22, 1)
        answer = await f.ask(prompt, cache_salt="a")
        f.forced = "d1", "p1"
        before = f.num_computed()
        longer = (*prompt, *answer, 1, 2, 3)
        await f.ask(longer, cache_salt="b")
        assert f.num_computed() - before == len(longer)
        assert f.counted("disagg_transfers_total", purpose="prefix") == 0
        await f.settle()

    run(story)


def test_a_wrong_grant_of_the_router_crosses_no_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names another's salt to the sink: the source still serves what it was granted, under another name."""

    async def story(f: ShellFleet) -> None:
        f.forced = "d0", "p0"
        prompt = prompt_of(22, 1)
        answer = await f.ask(prompt, cache_salt="a")
        longer = (*prompt, *answer, 1, 2, 3)
        monkeypatch.setattr(
            f.router._lenders,
            "_remembered",
            lambda request, sink: f.router.cluster.registry.named("d0"),
        )
        f.forced = "d1", "p1"
        before = f.num_computed()
        await f.ask(longer, cache_salt="b")
        assert f.num_computed() - before == len(longer)
        assert f.counted("disagg_transfer_bytes_total", purpose="prefix") == 0

    run(story)


def test_a_sink_that_asks_with_another_ticket_is_refused_and_counted() -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        control = f.links["d0"].control
        control.rewrite = lambda way, message: (
            replace(message, ticket=bytes(32)) if isinstance(message, p.Fetch) else message
        )
        f.forced = "d1", "p1"
        await f.ask((*history, *prompt_of(5, 9)))
        control.rewrite = None
        assert f.counted("disagg_transfers_refused_total", purpose="prefix", why="ticket") == 1
        assert len(f.record()["attempts"]) == 1

    run(story)


@pytest.mark.parametrize("why", ["purpose", "protocol", "digest"])
def test_what_no_honest_source_sends_is_refused_and_counted(why: str) -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        control = f.links["d0"].control

        def bend(way: str, message: Any) -> Any:
            if why == "purpose" and isinstance(message, p.Done):
                return replace(message, purpose="handoff")
            if why == "protocol" and isinstance(message, p.Accepted):
                return replace(message, boundary=message.boundary + SIZE * 99)
            return message

        control.rewrite = bend
        if why == "digest":
            cache = f.workers["d0"].engine.cache
            assert cache.prefixes is not None
            match = cache.prefixes.look_up(history[: whole_blocks(len(history) - 1)], "")
            full = next(number for number, group in enumerate(LAYOUT.groups) if group.window is None)
            pool = cache.pools[cache.layout.pool_of_group[full]]
            pool.memory[int(match.slots[full][1]), 0] ^= 1
        f.forced = "d1", "p1"
        await f.ask((*history, *prompt_of(5, 9)))
        control.rewrite = None
        assert f.counted("disagg_transfers_refused_total", purpose="prefix", why=why) == 1
        assert len(f.record()["attempts"]) == 1

    run(story)


def test_a_source_that_failed_twice_is_left_alone_for_a_while() -> None:
    async def story(f: ShellFleet) -> None:
        for number in range(3):
            history = await first_turn(f, salt=30 + number)
            control = f.links["d0"].control
            control.rewrite = lambda way, message: (
                replace(message, ticket=bytes(32)) if isinstance(message, p.Fetch) and message.tip else message
            )
            f.forced = "d1", "p1"
            await turn(f, (*history, *prompt_of(5, 9)))
            control.rewrite = None
        assert f.counted("disagg_transfers_refused_total", purpose="prefix") == 2

    run(story)


def test_a_chat_goes_on_at_workers_that_do_both() -> None:
    async def story(f: ShellFleet) -> None:
        history: tuple[int, ...] = ()
        for number, forced in enumerate([("b0", None), ("b1", None), ("b2", "b0"), ("b0", "b1")]):
            f.forced = forced
            prompt = (*history, *prompt_of(18 if not number else 7, number))
            stored = max(0, len(history) - 1)
            history, computed = await turn(f, prompt)
            assert computed == len(prompt) - whole_blocks(stored), number

    run(story, roles={"b0": "both", "b1": "both", "b2": "both"})


def test_what_a_prefix_took_is_told_of_its_request() -> None:
    async def story(f: ShellFleet) -> None:
        history = await first_turn(f)
        f.forced = "d1", "p1"
        await turn(f, (*history, *prompt_of(5, 9)))
        (attempt,) = f.record()["attempts"]
        assert attempt["stages"]["p1"].keys() >= {"prefill", "prefix"}

    run(story)


def test_workers_that_do_both_answer_crossing_prompts_in_pools_without_a_floor() -> None:
    """Each is full of room for what the other computes: one lets go after a second, and the router decides anew."""

    async def story(f: ShellFleet) -> None:
        asking = []
        for number in range(8):
            f.forced = ("b0", "b1") if number % 2 else ("b1", "b0")
            asking.append(asyncio.create_task(f.ask(prompt_of(34, 40 + number))))
            await until(lambda count=number + 1: len(f.router._records) == count, "it was placed")
        f.forced = None
        await asyncio.gather(*asking)
        outcomes = [f.router.record(f"request-{n + 1}")["attempts"][0]["outcome"] for n in range(8)]
        assert any(reasons.NO_ROOM in outcome for outcome in outcomes), outcomes

    run(story, roles={"b0": "both", "b1": "both"}, num_slots={"b0": (14, 40), "b1": (14, 40)})
