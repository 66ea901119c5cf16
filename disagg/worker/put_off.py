"""How long a prompt may wait for another worker's blocks before it is computed from what is here. Pure.

At most twice the estimated transfer, which a sound one needs not, and at most a quarter of the time that computing
takes: whatever becomes of the transfer, the prompt is a quarter later at most.
"""

from __future__ import annotations

from typing import Final

from disagg.transceiver.wire.messages.rates import MeasuredRates

TIMES_ESTIMATE: Final = 2.0
SHARE_OF_COMPUTING: Final = 0.25

FIRST_LATENCY_S: Final = 0.02
"""Of a transfer beside its bytes, before one was measured: six messages, and three turns of model threads that are idle
or in a step of a few ms."""

KEPT: Final = 0.8
"""What is left of the mean when another transfer ended: the last five count."""

GUESSED_GB_PER_S: Final = 1.0
"""Of a link that was too slow, or too short a time there, to be measured."""


class PutOff:
    """Of one worker. Times are seconds."""

    def __init__(self) -> None:
        self._latency_s = FIRST_LATENCY_S

    def limit_s(self, nbytes: int, gb_per_s: float, num_tokens: int, rates: MeasuredRates) -> float:
        """For a transfer of `nbytes` that saves the computing of `num_tokens`; 0 where it would be late anyway.

        Of unknown rates the transfer alone decides.
        """
        estimate_s = self._latency_s + _wire_s(nbytes, gb_per_s)
        if rates.prefill_tokens_per_s <= 0:
            return TIMES_ESTIMATE * estimate_s
        share_s = SHARE_OF_COMPUTING * (rates.prompt_step_s + num_tokens / rates.prefill_tokens_per_s)
        return min(TIMES_ESTIMATE * estimate_s, share_s) if share_s >= estimate_s else 0.0

    def note(self, seconds: float, nbytes: int, gb_per_s: float) -> None:
        """A transfer came in time."""
        beside_s = max(0.0, seconds - _wire_s(nbytes, gb_per_s))
        self._latency_s = KEPT * self._latency_s + (1 - KEPT) * beside_s


def _wire_s(nbytes: int, gb_per_s: float) -> float:
    return nbytes / ((gb_per_s if gb_per_s > 0 else GUESSED_GB_PER_S) * 1e9)
