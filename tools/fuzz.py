"""Feeds bytes that coverage chooses to whatever reads a peer's bytes: `python tools/fuzz.py TARGET --seconds 60`.

Needs atheris (`make fuzz` installs it). Seeds are the golden messages of the codec's tests and what the frame formats
pack themselves. What is found goes to `.fuzz/TARGET`: new inputs to `corpus`, a crash beside it. A crash belongs into
`tests/transceiver/test_fuzzed.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["disagg.transceiver"], exclude=["disagg.transceiver.planes.base"]):
    import fuzz_targets

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "transceiver" / "golden_messages.txt"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="fuzz what reads a peer's bytes")
    parser.add_argument("target", choices=sorted(fuzz_targets.TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args(arguments)
    folder = ROOT / ".fuzz" / options.target
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(fuzz_targets.seeds(options.target, golden_messages())):
        (corpus / f"seed-{number}").write_bytes(seed)
    flags = [f"-max_total_time={options.seconds}", f"-artifact_prefix={folder}/", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], fuzz_targets.TARGETS[options.target])
    atheris.Fuzz()  # ends the process: 0, or 77 with the crash
    return 0


def golden_messages() -> list[bytes]:
    return [bytes.fromhex(line.split()[1]) for line in GOLDEN.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
