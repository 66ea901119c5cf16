"""The index process: takes workers' events and answers who holds a prompt, until its parent closes the pipe.

Hashing a long prompt and noting tens of thousands of blocks a second take whole cores at times; the router's event loop
has tokens to forward. `python -m disagg.router.index.process` speaks frames over stdin and stdout.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
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
    QUESTION,
    SETTINGS,
    FrameBuffer,
    frame,
    values_of,
)
from disagg.transceiver.wire.messages.blocks import BlockEvents

READ_NBYTES: Final = 1 << 20
"""At once: a prompt of a quarter of a million tokens."""


class IndexServer:
    """Answers frames with frames. `SETTINGS` comes first."""

    def __init__(self) -> None:
        self.index: BlockIndex | None = None
        self._hasher: BlockHasher | None = None

    def handle(self, kind: bytes, values: tuple[Any, ...]) -> Iterator[bytes]:
        """What to answer, mostly nothing."""
        if kind == SETTINGS:
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
            index.add(*values)
        elif kind == GONE:
            index.remove(*values)
        elif kind == EVENTS and not index.take(events := BlockEvents(*values)):
            yield frame(MISSED, events.incarnation)

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
    identity, step = hasher.root(salt), 8 * block_size
    for start in range(0, len(tokens) - step, step):
        identity = hasher.child(identity, tokens[start : start + step])
        yield identity


def serve(jobs: int, answers: int) -> None:
    """Answer what comes at the descriptor `jobs` until it is closed."""
    server, buffer, poller = IndexServer(), FrameBuffer(), zmq.Poller()
    poller.register(jobs, zmq.POLLIN)
    is_swept = True
    while True:
        if not poller.poll(None if is_swept else 0):
            is_swept = not server.sweep()
            continue
        if not (data := os.read(jobs, READ_NBYTES)):
            return
        for kind, payload in buffer.feed(data):
            for answer in server.handle(kind, values_of(payload)):
                _write(answers, answer)
        is_swept = False


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
