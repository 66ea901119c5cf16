"""How much of a transfer a request waits for when slices go out while its prompt is computed.

    .venv/bin/python benchmarks/overlap.py [--rounds 9] [--chunk-ms 40] [--planes shm,tcp] [--check]

128 MiB of KV (case a of `disagg bench transfer`) become final in eight equal chunks, `--chunk-ms` apart, once in a
model of full attention and once in one whose window holds two chunks. *Exposed* is the time from the last chunk's end
to ready-to-decode, digests of both sides included; `after prefill` is the same with every slice held back until then.
`--check` ends with exit code 1 where the bound is not held, or a full model exposes more than a quarter.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from disagg.bench.cases import CASES
from disagg.bench.overlap import Overlap, measure_overlap

SEED = 20_240_301


def row(result: Overlap) -> str:
    """A line of the table: milliseconds."""
    exposed, after = result.exposed_s * 1e3, result.exposed_after_prefill_s * 1e3
    moved, last = result.nbytes >> 20, result.last_nbytes >> 20
    verdict = "yes" if result.is_held else "no"
    return (
        f"| {result.plane} | {result.model} | {moved} | {last} | {exposed:.1f} | {after:.1f} | {result.share:.0%} "
        f"| {result.gbps:.2f} | {result.bound_s * 1e3:.1f} | {verdict} |"
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--chunk-ms", type=float, default=40.0)
    parser.add_argument("--planes", default="shm,tcp")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    results = [
        measure_overlap(CASES["a"], plane, model, chunk_s=options.chunk_ms / 1e3, rounds=options.rounds, seed=SEED)
        for plane in options.planes.split(",")
        for model in ("full", "windowed")
    ]
    print(f"{shlex.join(['benchmarks/overlap.py', *argv])}: load {load:.2f} before, {os.getloadavg()[0]:.2f} after\n")
    print("| plane | model | MiB | last chunk MiB | exposed ms | after prefill ms | share | GB/s | bound ms | held |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(map(row, results)))
    return 1 if options.check and not all(result.is_held for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
