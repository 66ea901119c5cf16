"""Generated tokens on their way from a worker to the router, a step at a time, and the credit that paces them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Annotated, Final

from disagg.transceiver.wire.messages.ranges import (
    MAX_INT32,
    MAX_INT64,
    MAX_ITEMS,
    check_id_lengths,
    check_int,
    check_ints,
    check_size,
    fail,
)
from disagg.transceiver.wire.messages.sampling_limits import MAX_CHOICES
from disagg.transceiver.wire.messages.values import Sampling, TokenLogprobs
from disagg.transceiver.wire.schema import PackedFloats, PackedInts

TOKENS_WINDOW: Final = 16
"""STEP_TOKENS messages that a worker may send before the router took the first: at 1,000 steps/s what comes in 16 ms,
which is longer than a network's answer takes, and so few that a router which falls behind holds little."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Generated tokens of one attempt, the first at `index` (0 = the first of the answer): a row of `StepTokens`.

    With the first token comes `num_cached_tokens`: tokens of the prompt that were found in a cache and not computed.
    Not checked here, for there is one per token: `StepTokens` checks all of its rows at once.
    """

    transfer_id: str
    epoch: int
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0
    choice: int = 0


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Worker -> router: what one step generated for all of its requests, in arrays. One row per answer, in order.

    Row i has `counts[i]` of the `token_ids`. `num_tops`: one number per token where any has log-probabilities, of its
    most likely ones, -1 of a token that has none; `logprobs` then has that of the token and those of its `top_ids`.
    `choices`: which of several answers a row goes on with; empty = all are the first.
    """

    transfer_ids: Annotated[tuple[str, ...], MAX_ITEMS]
    epochs: PackedInts
    indexes: PackedInts
    nums_cached: PackedInts
    counts: PackedInts
    token_ids: PackedInts
    num_tops: PackedInts = ()
    top_ids: PackedInts = ()
    logprobs: PackedFloats = ()
    choices: PackedInts = ()

    def __post_init__(self) -> None:
        check_size("transfer_ids", self.transfer_ids, MAX_ITEMS)
        check_id_lengths("transfer_ids", self.transfer_ids)
        for name in ("epochs", "indexes", "nums_cached", "counts", *(["choices"] if self.choices else [])):
            if len(getattr(self, name)) != len(self.transfer_ids):
                fail(name, len(getattr(self, name)), f"one for each of {len(self.transfer_ids)} rows")
            check_ints(name, getattr(self, name), 0, MAX_INT32)
        if sum(self.counts) != len(self.token_ids):
            fail("counts", sum(self.counts), f"{len(self.token_ids)} tokens in all")
        check_ints("token_ids", self.token_ids, 0, MAX_INT32)
        self._check_logprobs()

    def _check_logprobs(self) -> None:
        if not self.num_tops and not self.top_ids and not self.logprobs:
            return
        if len(self.num_tops) != len(self.token_ids):
            fail("num_tops", len(self.num_tops), f"one for each of {len(self.token_ids)} tokens")
        check_ints("num_tops", self.num_tops, -1, MAX_ITEMS)
        check_ints("top_ids", self.top_ids, 0, MAX_INT32)
        num_top, num_known = sum(n for n in self.num_tops if n > 0), sum(n >= 0 for n in self.num_tops)
        if (len(self.top_ids), len(self.logprobs)) != (num_top, num_top + num_known):
            fail("top_ids, logprobs", (len(self.top_ids), len(self.logprobs)), f"{num_top}, {num_top + num_known}")
        if not all(value < math.inf for value in self.logprobs):  # NaN is not; minus infinity says: impossible
            fail("logprobs", "not a number, or infinite", "numbers")

    @classmethod
    def of(cls, rows: Iterable[Tokens]) -> StepTokens:
        """All of `rows`, which must be legal; those that continue the row before them are joined to it."""
        columns = _Columns()
        for row in rows:
            columns.add(row)
        return columns.message()

    def rows(self) -> Iterator[Tokens]:
        """The rows, as they were said."""
        first, logprobs = 0, self._all_logprobs()
        choices = self.choices or (0,) * len(self.transfer_ids)
        columns = (self.transfer_ids, self.epochs, self.indexes, self.counts, self.nums_cached, choices)
        for transfer_id, epoch, index, count, num_cached, choice in zip(*columns, strict=True):
            end = first + count
            some = () if logprobs is None else tuple(found for found in logprobs[first:end] if found is not None)
            yield Tokens(transfer_id, epoch, index, self.token_ids[first:end], some, num_cached, choice)
            first = end

    def _all_logprobs(self) -> list[TokenLogprobs | None] | None:
        if not self.num_tops:
            return None
        ids, values, found = iter(self.top_ids), iter(self.logprobs), list[TokenLogprobs | None]()
        for num_top in self.num_tops:
            if num_top < 0:
                found.append(None)
                continue
            chosen = next(values)
            top = tuple(zip(islice(ids, num_top), islice(values, num_top), strict=True))
            found.append(TokenLogprobs(chosen, top))
        return found


class _Columns:
    """The arrays of a `StepTokens` in the making."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []  # epoch, index, number cached, count, choice
        self.transfer_ids: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []

    def add(self, row: Tokens) -> None:
        count = len(row.token_ids)
        if self._continues(row):
            self.rows[-1][3] += count
        else:
            self.transfer_ids.append(row.transfer_id)
            self.rows.append([row.epoch, row.index, row.num_cached_tokens, count, row.choice])
        self.token_ids.extend(row.token_ids)
        self.logprobs.extend(row.logprobs or (None,) * count)

    def _continues(self, row: Tokens) -> bool:
        if not self.rows or self.transfer_ids[-1] != row.transfer_id:
            return False
        epoch, index, _, count, choice = self.rows[-1]
        had = count > 0 and self.logprobs[-1] is not None  # a row has log-probabilities for all of its tokens or none
        return (epoch, index + count, choice, had) == (row.epoch, row.index, row.choice, bool(row.logprobs))

    def message(self) -> StepTokens:
        rows = zip(*self.rows, strict=True) if self.rows else ((),) * 5
        epochs, indexes, nums_cached, counts, choices = rows
        columns = tuple(self.transfer_ids), epochs, indexes, nums_cached, counts, tuple(self.token_ids)
        if not any(self.logprobs):
            return StepTokens(*columns, choices=choices if any(choices) else ())
        known = [found for found in self.logprobs if found is not None]
        return StepTokens(
            *columns,
            tuple(-1 if found is None else len(found.top) for found in self.logprobs),
            tuple(token_id for found in known for token_id, _ in found.top),
            tuple(value for found in known for value in (found.logprob, *(value for _, value in found.top))),
            choices if any(choices) else (),
        )


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """What the client has of one of a request's answers: the ids of its tokens from the first on, none or more."""

    choice: int
    token_ids: PackedInts

    def __post_init__(self) -> None:
        check_int("choice", self.choice, 0, MAX_CHOICES - 1)
        check_ints("token_ids", self.token_ids, 0, MAX_INT32)


def check_output(output: Sequence[ChoiceOutput], sampling: Sampling, *, is_moved: bool) -> None:
    """Of open answers, in order of their numbers; the KV of one alone is moved. Raises `ValueError`."""
    choices = [answer.choice for answer in output]
    if any(a >= b for a, b in pairwise(choices)) or (choices and choices[-1] >= sampling.num_choices):
        fail("output", choices, f"ascending numbers of {sampling.num_choices} choices")
    if any(len(answer.token_ids) >= sampling.max_tokens for answer in output):
        fail("output", "an answer without an end", f"fewer than max_tokens = {sampling.max_tokens} tokens of each")
    if output and is_moved and sampling.num_choices > 1:
        fail("output", f"a transfer of {sampling.num_choices} choices", "a transfer of one")


@dataclass(frozen=True, slots=True)
class TokenCredit:
    """Router -> worker: this registration may send `limit` STEP_TOKENS messages in all, those before included."""

    limit: int

    def __post_init__(self) -> None:
        check_int("limit", self.limit, 0, MAX_INT64)
