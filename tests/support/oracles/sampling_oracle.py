"""The sampler's definition, written down plainly: float64, a full sort, nothing clever; and how sure its choice is.

Shares no code with `disagg.engine.sampling` but Philox, which has the known answers of its authors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from disagg.engine.philox import as_int64, gumbel
from disagg.engine.sampler import SampleInput

LARGEST = float(np.finfo(np.float64).max)
TINY = 2.0**-126
"""A distance that comes out smaller has lost digits on the way, or all of them."""
MARGIN = 1e-5
"""Decisions closer than this may fall either way: implementations round scores to float32."""


@dataclass(frozen=True)
class Choice:
    """`is_sure`: no decision on the way was closer than the margin."""

    token_id: int
    is_sure: bool


def choose(logits: np.ndarray, given: SampleInput) -> Choice:
    adjusted = _adjusted([float(x) for x in logits], given)
    largest = max(adjusted)
    if given.sampling.temperature < 2.0**-126:
        first = adjusted.index(largest)
        return Choice(first, all(x == largest or not _near(x, largest) for x in adjusted))
    scaled = np.array([_scaled(x, largest, given.sampling.temperature) for x in adjusted])
    rounded = scaled.astype(np.float32).astype(np.float64)  # a decision between equals that were not
    chosen = [_drawn(scaled, given, shift * MARGIN) for shift in (0, -1, 1)] + [_drawn(rounded, given, 0)]
    is_kept = all(x == largest or value < -TINY for x, value in zip(adjusted, scaled, strict=True))
    return Choice(chosen[0][0], is_kept and chosen[0][1] > MARGIN and len({token_id for token_id, _ in chosen}) == 1)


def _drawn(scaled: np.ndarray, given: SampleInput, shift: float) -> tuple[int, float]:
    """The token, and how much larger its score is than the next; every filter's cut moved by `shift`."""
    kept = np.flatnonzero(scaled > -math.inf)
    for keep in (_min_p, _top_k, _top_p):
        kept = keep(scaled, kept, given, shift)
    seeds, positions = np.full(len(kept), as_int64(given.sampling.seed)), np.full(len(kept), given.position)
    scores = scaled[kept] + gumbel(seeds, positions, kept)
    best = np.sort(scores)[-2:]
    return int(kept[scores.argmax()]), math.inf if len(best) == 1 else float(best[1] - best[0])


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12)


def _scaled(x: float, largest: float, temperature: float) -> float:
    """(x - largest) / temperature, which floats may not hold on the way."""
    with np.errstate(over="ignore"):
        value = 2 * float(np.float64(x / 2 - largest / 2) / np.float64(temperature))
    return -math.inf if value < -float(np.finfo(np.float32).max) else value


def _adjusted(logits: list[float], given: SampleInput) -> list[float]:
    sampling, size = given.sampling, len(logits)
    stops = {i for i in (*sampling.eos_token_ids, *sampling.stop_token_ids) if 0 <= i < size}
    if len(given.output) < sampling.min_tokens and len(stops) < size:
        logits = [-math.inf if i in stops else x for i, x in enumerate(logits)]
    for token_id, bias in sampling.logit_bias:
        if 0 <= token_id < size:
            logits[token_id] += bias
    seen, factor = {*given.prompt, *given.output}, sampling.repetition_penalty
    for i in range(size):
        if i in seen and factor != 1 and logits[i] > -math.inf:
            value = logits[i] * factor if logits[i] <= 0 else _divided(logits[i], factor)
            logits[i] = min(max(value, -LARGEST), LARGEST)
        count = list(given.output).count(i)
        if count:
            logits[i] -= count * sampling.frequency_penalty + sampling.presence_penalty
    return logits


def _divided(x: float, factor: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float64(x) / np.float64(factor))


def _min_p(scaled: np.ndarray, kept: np.ndarray, given: SampleInput, shift: float) -> np.ndarray:
    if given.sampling.min_p == 0:
        return kept
    return kept[scaled[kept] >= min(0.0, math.log(given.sampling.min_p) + _wide(shift, math.log(given.sampling.min_p)))]


def _top_k(scaled: np.ndarray, kept: np.ndarray, given: SampleInput, shift: float) -> np.ndarray:
    top_k = given.sampling.top_k
    if not 0 < top_k < len(kept):
        return kept
    least = float(np.sort(scaled[kept])[-top_k])
    return kept[scaled[kept] >= min(0.0, least + _wide(shift, least))]


def _wide(shift: float, score: float) -> float:
    """Scores are rounded to float32: the larger, the further."""
    return shift * (1 + abs(score) * 0.1)


def _top_p(scaled: np.ndarray, kept: np.ndarray, given: SampleInput, shift: float) -> np.ndarray:
    top_p = given.sampling.top_p
    if top_p == 1:
        return kept
    order = np.argsort(-scaled[kept], kind="stable")
    weights = np.exp(scaled[kept][order])
    before = (np.cumsum(weights) - weights) / weights.sum()
    is_in = before < top_p + shift * (1 + len(kept) * 1e-4)
    is_in[0] = True
    return np.sort(kept[order[is_in]])
