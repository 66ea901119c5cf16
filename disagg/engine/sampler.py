"""From logits to tokens: a pure function of (seed, absolute position, logits, ids so far).

Order, as in vLLM: mask stop tokens until `min_tokens`, logit bias, repetition, frequency and presence penalties; then
at temperature 0 the argmax, else temperature, min-p, top-k, top-p and a Gumbel-max draw. Reported log-probabilities are
those of the raw logits, before all of it. Nothing mixes rows, so a token does not depend on its batch.

All rows of a step are one call: in Triton where the logits lie on a CUDA device, else of the compiled helper where it
is built, else of NumPy. `sampling.rows` says in which numbers, and all give the same token. An error on
one row costs that row alone: the others have their tokens.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence

import torch

from disagg.engine.sampling import native, plain
from disagg.engine.sampling.drawn import Drawn, Readback, drawn_here
from disagg.engine.sampling.rows import GREEDY, Sampled, SampleInput, SampleRow, plan_row
from disagg.kernels.dispatch import backend

__all__ = ["Drawn", "SampleInput", "Sampled", "draw", "sample"]

log = logging.getLogger(__name__)

Implementation = Callable[[torch.Tensor, Sequence[SampleRow]], list[Sampled]]
Drawing = Callable[[torch.Tensor, Sequence[SampleRow]], Drawn]


def sample(logits: torch.Tensor, inputs: Sequence[SampleInput]) -> list[Sampled]:
    """One token per row of `logits` (float32 `[len(inputs), vocab_size]`)."""
    return list(draw(logits, inputs).read())


def draw(logits: torch.Tensor, inputs: Sequence[SampleInput]) -> Drawn:
    """`sample`, of which the host learns later: on a device what it takes is queued, and nothing is waited for."""
    assert logits.shape[0] == len(inputs)
    if not inputs:
        return drawn_here([], logits.device)
    planned = [_plan(given, logits.shape[1]) for given in inputs]
    drawn = _draw([GREEDY if isinstance(row, str) else row for row in planned], logits)
    return Drawn(drawn.token_ids, lambda: _with_errors(planned, drawn.read()))


def _with_errors(planned: Sequence[SampleRow | str], sampled: Sequence[Sampled]) -> list[Sampled]:
    return [
        Sampled(0, None, finite=one.finite, error=row) if isinstance(row, str) else one
        for row, one in zip(planned, sampled, strict=True)
    ]


def _plan(given: SampleInput, vocab_size: int) -> SampleRow | str:
    try:
        return plan_row(given, vocab_size)
    except Exception as error:
        return _noted(error)


def _draw(rows: Sequence[SampleRow], logits: torch.Tensor) -> Drawn:
    """The batch in one call. If that fails, each row by itself, to find the row at fault."""
    if logits.device.type != "cpu" and all(_is_plain(row) for row in rows):
        return _likeliest(logits)
    drawing = _drawing(logits.device)
    try:
        return drawing(logits.float(), rows)
    except Exception:
        log.warning("sampling %d rows at once failed: they are sampled one by one", len(rows))
        alone = [_sample_alone(drawing, logits[i : i + 1].float(), row) for i, row in enumerate(rows)]
        return drawn_here(alone, logits.device)


def _drawing(device: torch.device) -> Drawing:
    if device.type == "cuda" and backend(device).NAME == "triton":
        found: Drawing = importlib.import_module("disagg.engine.sampling.triton").draw
        return found
    implementation = _implementation(device)
    return lambda logits, rows: drawn_here(implementation(logits, rows), device)


def _implementation(device: torch.device) -> Implementation:
    return native.sample if device.type == "cpu" and native.is_loaded() else plain.sample


def _sample_alone(drawing: Drawing, logits: torch.Tensor, row: SampleRow) -> Sampled:
    try:
        return drawing(logits, [row]).read()[0]
    except Exception as error:
        return Sampled(0, None, finite=True, error=_noted(error))


def _noted(error: Exception) -> str:
    log.error("one row cannot be sampled", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _is_plain(row: SampleRow) -> bool:
    return row.inverse_temperature == 0 and row.adjustments is None and row.num_logprobs < 0


def _likeliest(logits: torch.Tensor) -> Drawn:
    """The first of each row's largest values: where the logits lie on a device, only the answers come from there."""
    highest, ids = logits.max(-1)
    copies = Readback([ids, highest.isfinite() & logits.amin(-1).isfinite()])

    def read() -> list[Sampled]:
        pairs = zip(*(copy.tolist() for copy in copies.read()), strict=True)
        return [Sampled(token_id if is_finite else 0, None, finite=is_finite) for token_id, is_finite in pairs]

    return Drawn(ids, read)
