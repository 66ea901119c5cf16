"""Log-probabilities of a prompt's own tokens, taken from a chunk's logits and nothing else of them kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from disagg.transceiver.wire.messages.prompt_logprobs import SCORED_AT_ONCE, PromptLogprobs

MAX_LOGITS = 1 << 24
"""Logits that are there at once: 64 MiB in float32, and as much again while they are compared. Matmuls of so many rows
(110 of a vocabulary of 152k) are as fast as larger ones."""

Numbers = npt.NDArray[np.float32] | npt.NDArray[np.int32]


def in_pieces(first: int, count: int, vocab_size: int) -> Iterator[range]:
    """Rows [first, first + count), as many at a time as `MAX_LOGITS` allows."""
    step = max(1, MAX_LOGITS // vocab_size)
    for start in range(first, first + count, step):
        yield range(start, min(start + step, first + count))


class Scoring:
    """One chunk's share: `targets` are the tokens at positions `start + 1`, ... that its first rows predict.

    The few numbers of each row stay on the logits' device until they are asked for.
    """

    def __init__(self, start: int, targets: Sequence[int], num_top: int) -> None:
        self._start, self._targets, self._num_top = start, targets, num_top
        self._num_scored = 0
        self._parts: list[tuple[torch.Tensor, ...]] = []

    @property
    def num_rows(self) -> int:
        return len(self._targets)

    def add(self, logits: torch.Tensor) -> None:
        """The next rows: float32 [rows, vocab_size]."""
        targets = self._targets[self._num_scored : self._num_scored + len(logits)]
        ids = torch.tensor(targets, dtype=torch.int64).to(logits.device)[:, None]
        own, total = logits.gather(1, ids), logits.logsumexp(-1, keepdim=True)
        ranks = (logits > own).sum(-1, dtype=torch.int32) + 1
        top = logits.topk(min(self._num_top, logits.shape[1]), dim=-1)
        self._parts.append(((own - total)[:, 0], ranks, top.indices.int(), top.values - total))
        self._num_scored += len(targets)

    def scores(self) -> list[PromptLogprobs] | None:
        """All of them, by position; None if logits were not finite."""
        assert self._num_scored == self.num_rows, "not every row was scored"
        columns = [torch.cat(column).cpu().numpy() for column in zip(*self._parts, strict=True)]
        if not columns or not np.isfinite(columns[0]).all():
            return None if columns else []
        starts = range(0, self.num_rows, SCORED_AT_ONCE)
        return [
            PromptLogprobs(
                self._start + first, *(_packed(column[first : first + SCORED_AT_ONCE]) for column in columns)
            )
            for first in starts
        ]


def _packed(numbers: Numbers) -> bytes:
    return numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
