"""From logits to tokens: a pure function of (seed, absolute position, logits, ids so far).

Order, as in vLLM: mask stop tokens until `min_tokens`, logit bias, repetition, frequency and presence penalties; then
at temperature 0 the argmax, else temperature, min-p, top-k, top-p and a Gumbel-max draw. Reported log-probabilities are
those of the raw logits, before all of it. Nothing mixes rows, so a token does not depend on its batch, and it
is computed in NumPy on the CPU, so it does not depend on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from disagg.engine.philox import as_int64, gumbel
from disagg.transceiver.wire.messages.values import Sampling, TokenLogprobs

Row = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SampleInput:
    """`position`: absolute position of the token to be chosen. `prompt`, `output`: the sequence's ids so far."""

    sampling: Sampling
    position: int
    prompt: Sequence[int]
    output: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """`finite` False: the row's logits held NaN or infinity, and `token_id` means nothing."""

    token_id: int
    logprobs: TokenLogprobs | None
    finite: bool


def sample(logits: torch.Tensor, inputs: Sequence[SampleInput]) -> list[Sampled]:
    """One token per row of `logits` (float32 `[len(inputs), vocab_size]`)."""
    assert logits.shape[0] == len(inputs)
    if not inputs:
        return []
    token_ids, finite = _likeliest(logits)
    candidates: list[_Candidates] = []
    for i, row in enumerate(inputs):
        if not finite[i] or (row.sampling.temperature == 0 and not _is_adjusted(row)):
            continue
        adjusted = _adjust(logits[i].cpu().numpy(), row)
        if row.sampling.temperature == 0:
            token_ids[i] = int(adjusted.argmax())
        else:
            candidates.append(_filter(i, adjusted, row))
    token_ids = _draw(token_ids, candidates, inputs)
    return [
        Sampled(token_ids[i], _logprobs(logits[i], token_ids[i], row.sampling.num_logprobs), finite=True)
        if finite[i]
        else Sampled(0, None, finite=False)
        for i, row in enumerate(inputs)
    ]


def _likeliest(logits: torch.Tensor) -> tuple[list[int], list[bool]]:
    """Of each row the first of its largest values, and whether all are finite.

    A maximum and a minimum keep NaN, so the two tell of every value. NumPy's are ten times faster than torch's on a
    CPU; from another device only the answers come.
    """
    if logits.device.type == "cpu":
        rows = logits.numpy()
        ids = rows.argmax(-1)
        extremes = rows[np.arange(len(rows)), ids], rows.min(-1)
        return ids.tolist(), (np.isfinite(extremes[0]) & np.isfinite(extremes[1])).tolist()
    highest, likeliest = logits.max(-1)
    return likeliest.tolist(), (highest.isfinite() & logits.amin(-1).isfinite()).tolist()


def _logprobs(logits: torch.Tensor, token_id: int, count: int | None) -> TokenLogprobs | None:
    """log_softmax of the raw logits, in float32; equal values in order of id."""
    if count is None:
        return None
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = sorted(zip(ids.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprobs(float(logprobs[token_id]), tuple(top))


# --- what changes even the greedy choice --------------------------------------------------------------------


def _is_adjusted(row: SampleInput) -> bool:
    s = row.sampling
    penalised = s.repetition_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0
    return penalised or bool(s.logit_bias) or len(row.output) < s.min_tokens


def _adjust(logits: Row, row: SampleInput) -> Row:
    if not _is_adjusted(row):
        return logits
    logits, sampling = logits.copy(), row.sampling
    if len(row.output) < sampling.min_tokens:
        stops = np.unique(_known([*sampling.eos_token_ids, *sampling.stop_token_ids], logits))
        if len(stops) < len(logits):  # a client may list them all; something must be chosen
            logits[stops] = -np.inf
    for token_id, bias in sampling.logit_bias:
        if 0 <= token_id < len(logits):
            logits[token_id] += bias
    return _penalise(logits, row)


def _known(ids: Sequence[int], logits: Row) -> npt.NDArray[np.int64]:
    array = np.asarray(ids, np.int64)
    return array[(array >= 0) & (array < len(logits))]


def _penalise(logits: Row, row: SampleInput) -> Row:
    """Penalties on ids seen so far.

    Repetition, of prompt and output (CTRL, arXiv:1909.05858): divides positive logits, multiplies negative ones.
    Frequency and presence, of the output, as OpenAI defines them: minus count * frequency, minus presence.
    """
    sampling = row.sampling
    if sampling.repetition_penalty != 1:
        seen = np.unique(_known([*row.prompt, *row.output], logits))
        factor = np.float32(sampling.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
    if sampling.frequency_penalty != 0 or sampling.presence_penalty != 0:
        used, counts = np.unique(_known(row.output, logits), return_counts=True)
        logits[used] -= (counts * sampling.frequency_penalty + sampling.presence_penalty).astype(np.float32)
    return logits


# --- drawing ------------------------------------------------------------------------------------------------


Kept = npt.NDArray[np.int64]
Scaled = npt.NDArray[np.float64]

# Candidates whose noise is computed at once: enough that NumPy's calls cost nothing, few enough (8 MiB a temporary)
# that a batch of whole vocabularies does not take the memory.
MAX_CANDIDATES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Ids that the filters leave in row `index`, and their logits over temperature."""

    index: int
    kept: Kept
    scores: Scaled


def _filter(index: int, logits: Row, row: SampleInput) -> _Candidates:
    sampling = row.sampling
    scaled = logits.astype(np.float64) / sampling.temperature
    kept = np.flatnonzero(scaled > -np.inf)
    kept = _min_p(scaled, kept, sampling.min_p)
    kept = _top_k(scaled, kept, sampling.top_k)
    kept = _top_p(scaled, kept, sampling.top_p)
    return _Candidates(index, kept, scaled[kept])


def _draw(token_ids: list[int], rows: Sequence[_Candidates], inputs: Sequence[SampleInput]) -> list[int]:
    """`token_ids` with a Gumbel-max draw at each of `rows`. Noise belongs to the id: filters do not shift it."""
    drawn = list(token_ids)
    for batch in _batches(rows):
        counts = [len(row.kept) for row in batch]
        seeds = np.repeat([as_int64(inputs[row.index].sampling.seed) for row in batch], counts)
        positions = np.repeat(np.array([inputs[row.index].position for row in batch], np.int64), counts)
        noise = gumbel(seeds, positions, np.concatenate([row.kept for row in batch]))
        for row, own in zip(batch, np.split(noise, np.cumsum(counts)[:-1]), strict=True):
            drawn[row.index] = int(row.kept[np.argmax(row.scores + own)])
    return drawn


def _batches(rows: Sequence[_Candidates]) -> Iterator[list[_Candidates]]:
    batch: list[_Candidates] = []
    for row in rows:
        if batch and sum(len(other.kept) for other in batch) + len(row.kept) > MAX_CANDIDATES:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _min_p(scaled: Scaled, kept: Kept, min_p: float) -> Kept:
    """Ids whose probability is at least `min_p` times the largest."""
    if min_p == 0:
        return kept
    return np.compress(scaled[kept] >= scaled[kept].max() + np.log(min_p), kept)


def _top_k(scaled: Scaled, kept: Kept, top_k: int) -> Kept:
    """The `top_k` likeliest; ties with the last of them stay, as in vLLM."""
    if top_k == 0 or top_k >= len(kept):
        return kept
    threshold = np.partition(scaled[kept], -top_k)[-top_k]
    return np.compress(scaled[kept] >= threshold, kept)


def _top_p(scaled: Scaled, kept: Kept, top_p: float) -> Kept:
    """The likeliest ids whose probabilities first sum to `top_p` or more, among those kept so far; at least one."""
    if top_p == 1:
        return kept
    order = np.argsort(-scaled[kept], kind="stable")
    weights = np.exp(scaled[kept][order] - scaled[kept].max())
    before = np.cumsum(weights / weights.sum()) - weights / weights.sum()
    return np.sort(kept[order[before < top_p]])
