"""The limits of one engine."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("prefill", "decode", "both")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. `check_invariants` (DISAGG_CHECK=1) examines cache and scheduler after every change.

    `vocab_size`: prompts with other token ids are refused; None = the caller has checked.
    """

    role: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    check_invariants: bool = False
    vocab_size: int | None = None
    swa_scratch: str = "off"
    """`on`: prompts put windowed blocks that a step outdates in scratch slots; `reuse`: save those that the same
    prompt begins with. The cache's layout allows it."""
    prefix_recheck_s: float | None = None
    """How long a registered block is trusted to be as it was hashed; None = as long as it is registered."""
    steps_ahead: int = 0
    """1: a step is launched before the tokens of the one before it are read. 0 where the host computes the steps."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: `{self.role}`, expected one of {ROLES}")
        if self.steps_ahead not in (0, 1):
            raise ValueError(f"steps ahead: {self.steps_ahead}, expected 0 or 1")
        if self.max_num_seqs < 1:
            raise ValueError(f"`--max-num-seqs`: {self.max_num_seqs}, expected at least 1")
        if self.max_model_len < 2:
            raise ValueError(f"`--max-model-len`: {self.max_model_len}, expected at least 2 (a prompt and its answer)")
        if self.max_num_batched_tokens < self.max_num_seqs:  # a step gives every answer its token
            raise ValueError(
                f"`--max-num-batched-tokens`: {self.max_num_batched_tokens}, expected at least "
                f"`--max-num-seqs` ({self.max_num_seqs})"
            )
