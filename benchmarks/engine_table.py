"""The engine on this CPU in one table: decode steps, prompts, sampling, and where a step goes, beside their peers.

    .venv/bin/python benchmarks/engine_table.py [--models demo 100m] [--vllm PYTHON] [--billion] [--dry]

Runs what benchmarks/engine.py, prefill.py, sampling.py and step_share.py measure, in shorter turns, in CPU time of this
process and on one thread, for each width of vectors that the compiled helper has here; their docstrings say what is
counted. `peer` is transformers: the better of `generate`'s caches, its own forward with sdpa, its own processors with
`torch.multinomial`; and vLLM's sampler where `--vllm` names the Python of an environment with it. Peers keep the widest
vectors throughout, so that rows of narrower ones understate `ratio`, the peer's time over ours. `--billion` adds a
random model of 1.2 billion parameters with a vocabulary of 151,936, of which a decode step of 32 rows takes seconds and
8 GiB: the share of sampling in it. `--dry` tries every row once, on little.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import engine as contest  # the neighbour files
import prefill
import sampling
import step_share
import torch

from disagg.bench.circumstances import circumstances
from disagg.engine.model import hf
from disagg.engine.model.load import LoadedModel
from disagg.kernels import native

HEADER = "| vectors | what | model | case | ours | peer | ratio |\n" + "|---" * 7 + "|"
WIDTHS = {"AVX-512": (512, "avx512f"), "AVX2": (256, "avx2")}
VOCAB = 151_936
SAMPLED = ("greedy", "temperature 1", "top-p 0.9", "top-k 50")
PREFILL_MODELS = {"demo": ("demo",), "100m": ("full", "windowed")}
VLLM_SAMPLER = """
import json, statistics, sys, time, torch
import vllm._custom_ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
rows, vocab, repeats = map(int, sys.argv[1:])
torch.set_num_threads(1)
logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 2.5
cases = {"temperature 1": (None, None), "top-p 0.9": (None, torch.full((rows,), 0.9)),
         "top-k 50": (torch.full((rows,), 50), None)}
found = {}
with set_current_vllm_config(VllmConfig()):
    sampler = TopKTopPSampler()
for name, (k, p) in cases.items():
    times = []
    for _ in range(repeats + 1):
        given, began = logits.clone(), time.process_time()
        sampler(given, {}, k, p)
        times.append(time.process_time() - began)
    found[name] = statistics.median(times[1:]) / rows * 1e3
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: batches, steps and turns of decoding, prompts' lengths, rows and ids of sampling."""

    batches: tuple[int, ...] = (8, 32)
    steps: int = 16
    turns: int = 3
    lengths: tuple[int, ...] = (128, 512, 2048)
    rows: int = 32
    vocab: int = VOCAB


DRY = Effort((2,), 1, 1, (20,), 2, 1000)


@contextmanager
def at_width(bits: int) -> Iterator[None]:
    """Inside, the compiled helper uses no wider vectors; torch and oneDNN keep theirs."""
    library = native.library()
    if library is None:
        yield
        return
    widest = ctypes.c_int.in_dll(library, "disagg_widest_vectors")
    before, widest.value = widest.value, bits
    try:
        yield
    finally:
        widest.value = before


def widths() -> dict[str, int]:
    """Vectors of the helper that this processor has; "none" where the helper is not built."""
    if native.library() is None:
        return {"none": 0}
    with open("/proc/cpuinfo") as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {name: bits for name, (bits, flag) in WIDTHS.items() if flag in flags} or {"plain": 0}


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def ratio(unit: str, ours: float, theirs: float) -> tuple[str, str, str]:
    return f"{ours:.3g} {unit}", f"{theirs:.3g} {unit}", f"{theirs / ours:.2f} x"


def decode_rows(name: str, effort: Effort) -> Iterator[str]:
    made = contest.Contest(name, contest.MODELS[name](), effort.batches, effort.steps, cb=False)
    for batch in effort.batches:
        times = made._measure(contest.equal(batch, contest.LONGEST, effort.steps), effort.turns)
        step = {key: statistics.median(seconds) * 1e3 for key, seconds in times.items()}
        best = min(step[each.name] for each in made.generates)
        yield line("decode", name, f"{batch} rows", *ratio("ms a step", step[made.ours.name], best))


def prefill_rows(name: str, effort: Effort) -> Iterator[str]:
    for kind in PREFILL_MODELS[name]:
        model = prefill.MODELS[kind]()
        for length, ours, theirs in prefill.times(model, effort.lengths, 512, effort.turns, contest.clock):
            yield line("prefill", kind, f"{length} tokens", *ratio("ms", ours, theirs))


def share_rows(name: str, effort: Effort) -> Iterator[str]:
    model = contest.suited(contest.MODELS[name]())
    for batch in effort.batches:
        share = step_share.measure(model, batch, effort.steps)
        around = (share.blocks + share.other) / share.step
        cells = (f"{share.step:.3g} ms a step", f"sampling {share.sampling / share.step:.1%}", f"around {around:.1%}")
        yield line("share of a step", name, f"{batch} rows", *cells)


def sampling_rows(effort: Effort, vllm: dict[str, float]) -> Iterator[str]:
    for case in sampling.CASES:
        if case.name in SAMPLED:
            theirs, helper, plain = sampling.times(case, effort.rows, effort.vocab, effort.turns, contest.clock)
            ours = plain if helper is None else helper
            where = f"{effort.rows} rows of {effort.vocab}"
            yield line("sampling", where, case.name, *ratio("ms a row", ours, theirs))
            if case.name in vllm:
                yield line("sampling, vLLM's", where, case.name, *ratio("ms a row", ours, vllm[case.name]))


def vllm_sampling(python: str, effort: Effort) -> dict[str, float]:
    """Milliseconds a row of vLLM's own sampler, by case."""
    sizes = map(str, (effort.rows, effort.vocab, effort.turns))
    done = subprocess.run([python, "-c", VLLM_SAMPLER, *sizes], capture_output=True, text=True, check=False)  # noqa: S603 (as told)
    if done.returncode:
        raise SystemExit(f"error: `--vllm {python}`: its sampler cannot be run: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def billion(*, is_dry: bool) -> LoadedModel:
    """A random Llama of 16 layers, of numbers that bfloat16 holds, as checkpoints of this size are."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": VOCAB}
    if is_dry:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048}
    config = hf.transformers.LlamaConfig(  # type: ignore[attr-defined]  # through the one module that imports it
        **sizes, num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=False
    )
    return contest.random_model(hf.transformers.LlamaForCausalLM, config)  # type: ignore[attr-defined]


def billion_row(*, is_dry: bool) -> str:
    model = contest.suited(billion(is_dry=is_dry), is_kept=False)
    share = step_share.measure(model, 2 if is_dry else 32, 2 if is_dry else 5, temperature=1.0)
    case = f"{share.batch} rows, temperature 1"
    cells = (f"{share.step:.3g} ms a step", f"sampling {share.sampling / share.step:.1%}", "")
    return line("share of a step", "1B" if not is_dry else "1B, dry", case, *cells)


def rows(options: argparse.Namespace, effort: Effort) -> Iterator[str]:
    vllm = vllm_sampling(options.vllm, effort) if options.vllm else {}
    for width, bits in widths().items():
        with at_width(bits):
            for name in options.models:
                for make in (decode_rows, prefill_rows, share_rows):
                    yield from (f"| {width} {row}" for row in make(name, effort))
            yield from (f"| {width} {row}" for row in sampling_rows(effort, vllm))
            if options.billion:
                yield f"| {width} {billion_row(is_dry=options.dry)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(PREFILL_MODELS), default=list(PREFILL_MODELS))
    parser.add_argument("--vllm", metavar="PYTHON", help="Python of an environment with vLLM, for its sampler")
    parser.add_argument("--billion", action="store_true", help="the share of sampling in a step of a 1B model")
    parser.add_argument("--dry", action="store_true", help="every row once, on little")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    contest.count_cpu_time()
    print(circumstances("1 thread", "CPU time", f"vectors: {', '.join(widths())}"))
    print("\n" + HEADER)
    for row in rows(options, DRY if options.dry else Effort()):
        print(row, flush=True)


if __name__ == "__main__":
    main()
