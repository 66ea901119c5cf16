"""Log-probabilities of a prompt's own tokens, some positions at a time, as the bytes of little-endian arrays."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from disagg.transceiver.wire.messages.ranges import MAX_INT32, check_int, check_ints, fail
from disagg.transceiver.wire.messages.sampling_limits import MAX_LOGPROBS
from disagg.transceiver.wire.messages.values import TokenLogprobs

SCORED_AT_ONCE: Final = 1024
"""Positions in one message: with 20 likely tokens each 168 KiB, so that a lease behind it waits for a millisecond."""

NUMBER_NBYTES: Final = 4

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the tokens at positions `start` to `start + count - 1`; the first token of a prompt has none.

    Per position: float32 `logprobs` and int32 `ranks` (1 = the likeliest token) of the prompt's token, and of the most
    likely tokens, likeliest first and as many for each position, int32 `top_ids` and float32 `top_logprobs`.
    """

    start: int
    logprobs: bytes
    ranks: bytes
    top_ids: bytes = b""
    top_logprobs: bytes = b""

    def __post_init__(self) -> None:
        check_int("start", self.start, 1, MAX_INT32)
        nbytes = len(self.logprobs)
        if not 0 < nbytes <= SCORED_AT_ONCE * NUMBER_NBYTES or nbytes % NUMBER_NBYTES or len(self.ranks) != nbytes:
            fail("logprobs", (nbytes, len(self.ranks)), f"as many ranks, for 1 to {SCORED_AT_ONCE} positions")
        per_position, rest = divmod(len(self.top_ids), nbytes)
        if rest or per_position > MAX_LOGPROBS or len(self.top_logprobs) != len(self.top_ids):
            fail("top_ids", len(self.top_ids), f"the same number for each position, at most {MAX_LOGPROBS}")
        check_ints("ranks", _ints(self.ranks), 1, MAX_INT32)
        check_ints("top_ids", _ints(self.top_ids), 0, MAX_INT32)
        for name in ("logprobs", "top_logprobs"):
            if not sum(_floats(getattr(self, name))) < math.inf:  # NaN and infinity are not; minus infinity is legal
                fail(name, "a value that is not", "numbers")

    @property
    def count(self) -> int:
        return len(self.logprobs) // NUMBER_NBYTES

    @property
    def end(self) -> int:
        """The first position behind it."""
        return self.start + self.count

    @property
    def num_top(self) -> int:
        return len(self.top_ids) // len(self.logprobs)

    def from_position(self, start: int) -> PromptLogprobs:
        """Without the positions before `start`, which lies within."""
        few = (start - self.start) * NUMBER_NBYTES
        many = few * self.num_top
        return PromptLogprobs(
            start, self.logprobs[few:], self.ranks[few:], self.top_ids[many:], self.top_logprobs[many:]
        )

    def rows(self) -> Iterator[tuple[int, TokenLogprobs]]:
        """(rank, log-probabilities) of each position."""
        logprobs, top_logprobs = _floats(self.logprobs), _floats(self.top_logprobs)
        ranks, top_ids = _ints(self.ranks), _ints(self.top_ids)
        for i, (rank, logprob) in enumerate(zip(ranks, logprobs, strict=True)):
            few = slice(i * self.num_top, (i + 1) * self.num_top)
            yield rank, TokenLogprobs(logprob, tuple(zip(top_ids[few], top_logprobs[few], strict=True)))


def _ints(data: bytes) -> array[int]:
    return _filled(array("i"), data)


def _floats(data: bytes) -> array[float]:
    return _filled(array("f"), data)


def _filled(numbers: array[Number], data: bytes) -> array[Number]:
    numbers.frombytes(data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
