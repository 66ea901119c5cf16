"""What sampling parameters may be: the API refuses a request outside of it, `Sampling` a message.

Within it every combination is legal and has one exact meaning (`disagg.engine.sampling.rows`). Fractions have no least
value above 0 and temperatures and repetition penalties no largest: what float32 cannot hold is computed in float64.
What is added to logits the API bounds as OpenAI does; a message may hold whatever is a logit itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

MAX_TOKENS: Final = 2**31 - 1  # the model's own limit is far below; this only keeps it a 32-bit integer
LARGEST_LOGIT: Final = (2 - 2.0**-23) * 2.0**127  # of float32; float64 holds any sum of what a message may add
MAX_PENALTY: Final = 2.0  # OpenAI's limit of presence and frequency penalties, in both directions
MAX_BIAS: Final = 100.0  # OpenAI's limit, in both directions: more than any logit of a model served here
MAX_BIASES: Final = 1024  # they cross the wire with each attempt and are applied at each token; OpenAI's limit is 300
MAX_STOP_TOKEN_IDS: Final = 256  # as above; models have a few
MAX_LOGPROBS: Final = 20  # OpenAI's limit for chat, vLLM's default for both
MAX_CHOICES: Final = 128  # OpenAI's limit of `n`
CHOICE_SEEDS: Final = 2**63 - 1  # choice i has seed + i, wrapped into what any integer type holds
LARGEST_INT64: Final = 2**63 - 1  # ids are put into arrays of this type
LARGEST_SEED: Final = 2**64 - 1  # Philox's key has 64 bits; a negative seed is taken as its two's complement


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is finite and from `low` to `high`."""
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name}: {value}, expected {_range(low, high)}{_finite(value)}")


def check_above(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is finite, more than `low` and at most `high`."""
    if not math.isfinite(value) or not low < value <= high:
        most = f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(f"{name}: {value}, expected more than {low:g}{most}{_finite(value)}")


def check_count(name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless `value` is from `low` to `high`."""
    if not low <= value <= high:
        raise ValueError(f"{name}: {value}, expected {_range(low, high)}")


def check_ids(name: str, ids: Sequence[int], most: int) -> None:
    """Raise ValueError for more than `most`, or one that no array of ids holds. An id of no token is ignored later."""
    if len(ids) > most:
        raise ValueError(f"{name}: {len(ids)} of them, expected at most {most}")
    if ids and not -LARGEST_INT64 <= min(ids) <= max(ids) <= LARGEST_INT64:
        raise ValueError(f"{name}: token ids from {min(ids)} to {max(ids)}, expected integers of 64 bits")


def _range(low: float, high: float) -> str:
    return f"{low:g} to {high:g}" if high < MAX_TOKENS else f"{low:g} or more"


def _finite(value: float) -> str:
    return "" if math.isfinite(value) else " and finite"
