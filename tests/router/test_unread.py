"""What a client has not taken: joined where it is behind, whole, and never lost with a cancelled wait."""

from __future__ import annotations

import asyncio

from support.event_loop import in_event_loop, within

from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.router.unread import MAX_JOINED, Unread
from disagg.transceiver.wire.messages.values import TokenLogprobs


def chunk(index: int, *token_ids: int) -> TokenChunk:
    return TokenChunk(index, token_ids, tuple(TokenLogprobs(-float(i)) for i in token_ids), 3 if index == 0 else 0)


@in_event_loop
async def test_a_reader_that_is_behind_gets_what_came_in_one_piece_and_the_end_apart() -> None:
    unread = Unread()
    for index in range(5):
        unread.put(chunk(index, index))
    unread.put(GenerationEnd("length"))
    assert await within(unread.take()) == chunk(0, *range(5))
    assert await within(unread.take()) == GenerationEnd("length")


@in_event_loop
async def test_no_piece_is_longer_than_one_turn_may_make_text_of() -> None:
    unread = Unread()
    for index in range(3 * MAX_JOINED):
        unread.put(chunk(index, index))
    taken = [await within(unread.take()) for _ in range(3)]
    assert [len(item.token_ids) for item in taken if isinstance(item, TokenChunk)] == [MAX_JOINED] * 3


@in_event_loop
async def test_a_cancelled_wait_loses_nothing() -> None:
    unread = Unread()
    waiting = asyncio.create_task(unread.take())
    await asyncio.sleep(0)
    unread.put(chunk(0, 1))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await within(unread.take()) == chunk(0, 1)
