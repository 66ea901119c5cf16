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
    kept, sure = np.flatnonzero(scaled > -math.inf), True
    for keep in (_min_p, _top_k, _top_p):
        kept, is_sure = keep(scaled, kept, given)
        sure = sure and is_sure
    seeds, positions = np.full(len(kept), as_int64(given.sampling.seed)), np.full(len(kept), given.position)
    scores = scaled[kept] + gumbel(seeds, positions, kept)
    best = np.sort(scores)
    sure = sure and (len(best) == 1 or best[-1] - best[-2] > MARGIN)
    return Choice(int(kept[scores.argmax()]), sure)


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


def _min_p(scaled: np.ndarray, kept: np.ndarray, given: SampleInput) -> tuple[np.ndarray, bool]:
    if given.sampling.min_p == 0:
        return kept, True
    distance = scaled[kept] - math.log(given.sampling.min_p)
    return kept[distance >= 0], bool((np.abs(distance[scaled[kept] < 0]) > MARGIN).all())


def _top_k(scaled: np.ndarray, kept: np.ndarray, given: SampleInput) -> tuple[np.ndarray, bool]:
    top_k = given.sampling.top_k
    if not 0 < top_k < len(kept):
        return kept, True
    least = np.sort(scaled[kept])[-top_k]
    distance = np.abs(scaled[kept] - least)
    return kept[scaled[kept] >= least], bool(((distance == 0) | (distance > _rounding(least))).all())


def _rounding(score: float) -> float:
    return MARGIN + abs(score) * 1e-6


def _top_p(scaled: np.ndarray, kept: np.ndarray, given: SampleInput) -> tuple[np.ndarray, bool]:
    top_p = given.sampling.top_p
    if top_p == 1:
        return kept, True
    order = np.argsort(-scaled[kept], kind="stable")
    values = scaled[kept][order]
    weights = np.exp(values)
    before = (np.cumsum(weights) - weights) / weights.sum()
    close = np.diff(values)
    sure = np.abs(before - top_p).min() > MARGIN + len(kept) * 2.0**-31
    sure = sure and bool(((close == 0) | (close < -_rounding(float(values[-1])))).all() or before[-1] < top_p)
    return np.sort(kept[order[before < top_p]]), bool(sure)
