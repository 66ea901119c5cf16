"""Which tokens a sequence holds already, for penalties: counted once, then updated by one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class SeenTokens:
    """Of one sequence. `follow` costs the prompt the first time, and after that the tokens that are new."""

    __slots__ = ("_counts", "_num_output", "_places", "_used", "_vocab_size", "bits")

    def __init__(self) -> None:
        self.bits: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        """Bit i: id i is in the prompt or the output."""
        self._vocab_size = -1
        self._num_output = 0
        self._places: dict[int, int] = {}
        self._used: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)

    @property
    def used(self) -> npt.NDArray[np.int64]:
        """Ids of the output, each once."""
        return self._used[: len(self._places)]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How often each of `used` came."""
        return self._counts[: len(self._places)]

    def follow(self, prompt: Sequence[int], output: Sequence[int], vocab_size: int) -> None:
        """Take in what came since the last call. `output` only grows; ids outside the vocabulary do not count."""
        if self._vocab_size != vocab_size or len(output) < self._num_output:
            self._begin(prompt, vocab_size)
        for token_id in output[self._num_output :]:
            if 0 <= token_id < vocab_size:
                self._add(token_id)
        self._num_output = len(output)

    def _begin(self, prompt: Sequence[int], vocab_size: int) -> None:
        self._vocab_size, self._num_output = vocab_size, 0
        self._places.clear()
        ids = np.asarray(prompt, np.int64)
        is_seen = np.zeros(-(-vocab_size // 64) * 64, np.bool_)
        is_seen[ids[(ids >= 0) & (ids < vocab_size)]] = True
        self.bits = np.packbits(is_seen, bitorder="little").view(np.uint64)

    def _add(self, token_id: int) -> None:
        place = self._places.get(token_id)
        if place is None:
            place = self._place(token_id)
        self._counts[place] += 1
        self.bits[token_id >> 6] |= np.uint64(1 << (token_id & 63))

    def _place(self, token_id: int) -> int:
        place = self._places[token_id] = len(self._places)
        if place == len(self._used):
            self._used, self._counts = (np.resize(a, max(64, 2 * place)) for a in (self._used, self._counts))
        self._used[place], self._counts[place] = token_id, 0
        return place
