"""What came for one client and was not taken yet. A slow reader gets its tokens joined and delays no other client."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from itertools import chain
from typing import Final

from disagg.router.generation import GenerationEnd, GenerationError, TokenChunk

MAX_JOINED: Final = 64
"""Tokens handed on at once: their text is made in one turn of the event loop, which takes about 0.2 ms."""

Item = TokenChunk | GenerationEnd | GenerationError


class Unread:
    """At most `max_tokens` tokens and an end. `take` belongs to one task."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    @property
    def is_empty(self) -> bool:
        return not self._items

    async def take(self) -> Item:
        """The next item, joined with those that continue it. Cancel-safe; the caller owns the deadline."""
        while not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        item = self._items.popleft()
        if self._items and isinstance(item, TokenChunk):
            return self._joined(item)
        return item

    def _joined(self, first: TokenChunk) -> TokenChunk:
        chunks, count = [first], len(first.token_ids)
        while count < MAX_JOINED and self._items:
            following = self._items[0]
            if not isinstance(following, TokenChunk) or following.choice != first.choice:
                break
            self._items.popleft()
            chunks.append(following)
            count += len(following.token_ids)
        token_ids = tuple(chain.from_iterable(chunk.token_ids for chunk in chunks))
        logprobs = tuple(chain.from_iterable(chunk.logprobs for chunk in chunks))
        return replace(first, token_ids=token_ids, logprobs=logprobs)
