"""Sampling a step's rows: the engine's sampler against transformers' logits processors and torch.multinomial.

    python benchmarks/sampling.py [--rows 1 32] [--vocab 151936] [--repeats 9] [--threads 2]

Contenders take turns on the same logits in one process. Penalties are measured on a sequence that goes on: the
engine's counts are there, as after its first token; transformers' processor reads the sequence each time, as it does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from disagg.bench.circumstances import circumstances
from disagg.engine.sampler import SampleInput
from disagg.engine.sampling import native, plain
from disagg.engine.sampling.rows import Sampled, SampleRow, plan_row
from disagg.engine.sampling.seen import SeenTokens
from disagg.transceiver.wire.messages.values import Sampling

PROMPT_LEN = 1000
Way = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    options: dict[str, float]
    prompt_len: int = PROMPT_LEN


CASES = (
    Case("greedy", {"temperature": 0.0}),
    Case("temperature 1", {}),
    Case("top-p 0.9", {"top_p": 0.9}),
    Case("top-k 50", {"top_k": 50}),
    Case("top-k 50, top-p 0.9", {"top_k": 50, "top_p": 0.9}),
    Case("min-p 0.05", {"min_p": 0.05}),
    Case("repetition 1.1, prompt 1k", {"repetition_penalty": 1.1}),
    Case("repetition 1.1, prompt 128k", {"repetition_penalty": 1.1}, 131_072),
)


def instruction_set() -> str:
    """The widest vectors of this machine that the compiled helper knows."""
    with open("/proc/cpuinfo") as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return next((name for name in ("avx512f", "avx2") if name in flags), "neither avx2 nor avx512f")


def made_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Normal with deviation 2.5: of the width that chat models' logits have."""
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 2.5


def inputs(case: Case, num_rows: int, vocab_size: int) -> list[SampleInput]:
    prompt = tuple(torch.randint(vocab_size, (case.prompt_len,), generator=torch.Generator().manual_seed(1)).tolist())
    samplings = (Sampling(max_tokens=9, seed=i, **case.options) for i in range(num_rows))  # type: ignore[arg-type]
    return [SampleInput(sampling, case.prompt_len, prompt, (1, 2), SeenTokens()) for sampling in samplings]


def engine(
    implementation: Callable[[torch.Tensor, Sequence[SampleRow]], list[Sampled]],
    logits: torch.Tensor,
    given: Sequence[SampleInput],
) -> Way:
    return lambda: implementation(logits, [plan_row(one, logits.shape[1]) for one in given])


def transformers_way(case: Case, logits: torch.Tensor, given: Sequence[SampleInput]) -> Way:
    """Its own processors in its own order, then softmax and multinomial, as `generate` samples."""
    options = case.options
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if options.get("temperature") != 0:
        processors.append(TemperatureLogitsWarper(1.0))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    ids = torch.tensor([[*one.prompt, *one.output] for one in given])

    def sample() -> object:
        scores = processors(ids, logits.clone())  # type: ignore[arg-type]  # a processor may write in place
        if options.get("temperature") == 0:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), num_samples=1)

    return sample


def times(
    case: Case, num_rows: int, vocab_size: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float | None, float]:
    """Milliseconds a row of transformers, the helper (None where it is not built) and NumPy, medians of turns."""
    logits, given = made_logits(num_rows, vocab_size), inputs(case, num_rows, vocab_size)
    ways = [engine(plain.sample, logits, given), transformers_way(case, logits, given)]
    ways += [engine(native.sample, logits, given)] if native.is_loaded() else []
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for way, taken in zip(ways, seconds, strict=True):
            started = clock()
            way()
            if turn:  # the first makes what is kept
                taken.append(clock() - started)
    numpy, theirs, *helper = (statistics.median(taken) / num_rows * 1e3 for taken in seconds)
    return theirs, helper[0] if helper else None, numpy


def measure(case: Case, num_rows: int, vocab_size: int, repeats: int) -> str:
    """A line of the table: milliseconds a row of each contender, and the ratio."""
    theirs, helper, numpy = times(case, num_rows, vocab_size, repeats)
    ours = "not built | " if helper is None else f"{helper:.3f} | {theirs / helper:.1f} x"
    return f"| {num_rows} | {case.name} | {theirs:.3f} | {ours} | {numpy:.3f} | {theirs / numpy:.1f} x |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32], help="rows of a step")
    parser.add_argument("--vocab", type=int, default=151_936, help="ids of the vocabulary")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the helper")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(circumstances(f"{options.threads} threads", instruction_set(), f"vocabulary {options.vocab}"))
    print("\nMilliseconds a row.\n")
    print("| rows | sampling | transformers | helper | transformers / helper | NumPy | transformers / NumPy |")
    print("|---|---|---|---|---|---|---|")
    for num_rows in options.rows:
        for case in CASES:
            print(measure(case, num_rows, options.vocab, options.repeats), flush=True)


if __name__ == "__main__":
    main()
