"""The index process: takes workers' events and says which of them hold a prompt, until its parent closes the pipe.

Hashing a long prompt and noting tens of thousands of blocks a second take whole cores at times; the router's event loop
has tokens to forward. `python -m disagg.router.index.process` speaks frames over stdin and stdout.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import zmq

from disagg.cache.identity import BlockHasher
from disagg.router.index.block_index import BlockIndex, GroupSpan, Holder
from disagg.router.index.frames import (
    ADDED,
    EVENTS,
    FIGURES,
    GONE,
    HOLDERS,
    MISSED,
    PUBLISH,
    QUESTION,
    REFUSED,
    SETTINGS,
    FrameBuffer,
    frame,
    values_of,
)
from disagg.router.index.published import CLEARED, event_hasher, payload_of, published
from disagg.router.index.publisher import KvEventsPublisher, PublishOptions
from disagg.transceiver.wire.messages.blocks import BlockEvents

READ_NBYTES: Final = 1 << 20
"""At once: a prompt of a quarter of a million tokens."""

MAX_TOLD_NBYTES: Final = 16 << 20
"""Read and not noted yet: beyond it the pipe is left to fill, and the router to find that nothing is read."""


class IndexServer:
    """Answers frames with frames. `SETTINGS` comes first."""

    def __init__(self) -> None:
        self.index: BlockIndex | None = None
        self.publisher: KvEventsPublisher | None = None
        self._hasher: BlockHasher | None = None
        self._hashed: Callable[[bytes], bytes] = event_hasher(b"")
        self._workers: dict[str, tuple[bytes, str]] = {}
        """Topic and medium by incarnation."""
        self._model = ""

    def handle(self, kind: bytes, values: tuple[Any, ...]) -> Iterator[bytes]:
        """What to answer, mostly nothing."""
        if kind == PUBLISH:
            yield self._publish(PublishOptions(*values))
        elif kind == SETTINGS:
            key, fingerprint, spans = values
            self._hasher, self.index = BlockHasher(key, fingerprint), BlockIndex([GroupSpan(*span) for span in spans])
        elif kind == FIGURES:
            yield frame(FIGURES, len(self.index or ()), time.process_time(), _resident_nbytes())
        elif kind == QUESTION:
            number, salt, most, prompt = values
            yield frame(HOLDERS, number, [(h.incarnation, h.num_tokens) for h in self._holders(salt, most, prompt)])
        elif self.index is not None:
            yield from self._note(self.index, kind, values)

    def sweep(self) -> bool:
        """Some housekeeping; whether there is more."""
        return self.index is not None and self.index.sweep()

    def _note(self, index: BlockIndex, kind: bytes, values: tuple[Any, ...]) -> Iterator[bytes]:
        if kind == ADDED:
            incarnation, block_size, worker_id, medium = values
            index.add(incarnation, block_size)
            self._workers[incarnation] = f"kv@{worker_id}@{self._model}".encode(), medium
        elif kind == GONE:
            (incarnation,) = values
            self._say(incarnation, [CLEARED])
            index.remove(incarnation)
            self._workers.pop(incarnation, None)
        elif kind == EVENTS:
            yield from self._take(index, BlockEvents(*values))

    def _take(self, index: BlockIndex, events: BlockEvents) -> Iterator[bytes]:
        incarnation, is_known = events.incarnation, events.incarnation in self._workers
        if not index.take(events):
            self._say(incarnation, [CLEARED])
            yield frame(MISSED, incarnation)
        elif self.publisher is not None and is_known and index.follows(incarnation):
            self._say(incarnation, published(events, index.groups, self._workers[incarnation][1], self._hashed))

    def _say(self, incarnation: str, events: Sequence[dict[str, Any]]) -> None:
        """To subscribers, under the worker's topic."""
        if self.publisher is not None and events and incarnation in self._workers:
            self.publisher.publish(self._workers[incarnation][0], payload_of(time.time(), events))

    def _publish(self, options: PublishOptions) -> bytes:
        try:
            self.publisher = KvEventsPublisher(options)
        except zmq.ZMQError as exc:
            return frame(REFUSED, zmq.strerror(exc.errno or 0))
        self._hashed, self._model = event_hasher(options.hash_key), options.model
        return frame(PUBLISH, *self.publisher.endpoints)

    def _holders(self, salt: str, most: int, prompt: bytes) -> list[Holder]:
        """Of all block sizes; blocks of one size are named once, and no further than any worker holds them."""
        if self.index is None or self._hasher is None:
            return []
        tokens = np.frombuffer(prompt, dtype="<i4").astype("<i8").tobytes()
        found: list[Holder] = []
        for block_size in self.index.block_sizes:
            chain = chain_of(self._hasher, salt, tokens, block_size)
            found += self.index.holders(chain, block_size, most)
        return sorted(found, key=lambda holder: -holder.num_tokens)[:most]


def chain_of(hasher: BlockHasher, salt: str, tokens: bytes, block_size: int) -> Iterator[bytes]:
    """The identities of the blocks that a prompt could begin with. `tokens`: `token_bytes` of the prompt.

    The last token is always computed, so a block that ends with it is none of them.
    """
    step = 8 * block_size
    return hasher.names(salt, (tokens[start : start + step] for start in range(0, len(tokens) - step, step)))


def serve(jobs: int, answers: int) -> None:
    """Answer what comes at the descriptor `jobs` until it is closed."""
    loop = _Loop(jobs, answers)
    try:
        while loop.turn():
            pass
    finally:
        loop.close()


class _Loop:
    """Questions are answered before what was told ahead of them is noted: a batch of events takes tens of ms."""

    def __init__(self, jobs: int, answers: int) -> None:
        self._jobs, self._answers = jobs, answers
        self._server, self._buffer, self._poller = IndexServer(), FrameBuffer(), zmq.Poller()
        self._poller.register(jobs, zmq.POLLIN)
        self._told: deque[tuple[bytes, bytes]] = deque()
        self._told_nbytes, self._is_swept = 0, True

    def turn(self) -> bool:
        """Read and answer what came, or note one thing told, or clean up. False at the end of what comes."""
        may_wait = self._is_swept and not self._told
        ready = dict(self._poller.poll(None if may_wait else 0))
        if self._server.publisher is not None and self._server.publisher.replays in ready:
            self._server.publisher.answer_replay()  # one a turn: what workers tell goes on beside it
        if self._jobs in ready and self._told_nbytes < MAX_TOLD_NBYTES:
            return self._read()
        if self._told:
            kind, payload = self._told.popleft()
            self._told_nbytes -= len(payload)
            self._is_swept = False
            self._handle(kind, payload)
        else:
            self._is_swept = not self._server.sweep()
        return True

    def _read(self) -> bool:
        data = os.read(self._jobs, READ_NBYTES)
        for kind, payload in self._buffer.feed(data):
            if kind in (QUESTION, PUBLISH):
                self._handle(kind, payload)
            else:
                self._told.append((kind, payload))
                self._told_nbytes += len(payload)
        return bool(data)

    def close(self) -> None:
        if self._server.publisher is not None:
            self._server.publisher.close()

    def _handle(self, kind: bytes, payload: bytes) -> None:
        for answer in self._server.handle(kind, values_of(payload)):
            _write(self._answers, answer)
        if kind == PUBLISH and self._server.publisher is not None:
            self._poller.register(self._server.publisher.replays, zmq.POLLIN)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _resident_nbytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # sent to a whole group at times; the parent decides
        signal.signal(number, signal.SIG_IGN)
    serve(sys.stdin.fileno(), sys.stdout.fileno())


if __name__ == "__main__":
    main()
