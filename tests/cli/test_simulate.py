"""`disagg simulate` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagg.cli.main import main

RATES = {"prefill_step_s": {"16": 0.008, "512": 0.06}, "decode_step_s": {"1": 0.006, "8": 0.009}}


@pytest.fixture
def rates(tmp_path: Path) -> str:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(RATES))
    return str(path)


def test_fleets_and_policies_are_compared_as_a_table_with_plots(
    rates: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plots = tmp_path / "plots"
    command = ["simulate", "chat", "--rates", rates, "--requests", "40", "--fleets", "1p1d,2b", "--plots", str(plots)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(("  1p1d", "  2b"))] == [
        [fleet, policy] for fleet in ("1p1d", "2b") for policy in ("round-robin", "least-loaded", "prefix-aware")
    ]
    assert "40 requests; good: first token within 2 s" in out
    assert "1p1d prefix-aware: 40 requests in " in err
    assert sorted(path.name for path in plots.iterdir()) == [
        "goodput.svg",
        "hits.svg",
        "itl.svg",
        "moved.svg",
        "ttft.svg",
    ]


def test_a_trace_that_was_written_gives_the_same_figures_when_it_is_read(
    rates: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, common = tmp_path / "trace.jsonl", ["--rates", rates, "--policies", "prefix-aware", "--json"]
    assert main(["simulate", "long", "--requests", "30", "--prompt", "64", "--write-trace", str(trace), *common]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main(["simulate", str(trace), *common]) == 0
    read = json.loads(capsys.readouterr().out)
    assert made["num_requests"] == read["num_requests"] == 30
    for name in ("hit_rate", "handoff_nbytes", "num_computed_tokens"):
        assert made["runs"][0][name] == read["runs"][0][name]
    assert made["runs"][0]["ttft_s"]["p50"] == pytest.approx(read["runs"][0]["ttft_s"]["p50"], rel=1e-3)


def test_faster_arrivals_wait_longer(rates: str, capsys: pytest.CaptureFixture[str]) -> None:
    waits = []
    for speed in ("1", "20"):
        assert (
            main(["simulate", "bursty", "--rates", rates, "--speed", speed, "--json", "--policies", "least-loaded"])
            == 0
        )
        waits.append(json.loads(capsys.readouterr().out)["runs"][0]["ttft_s"]["p50"])
    assert waits[1] > 2 * waits[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["chat"], "`--rates` is missing: measure with `disagg bench rates > rates.json` and give that file"),
        (["absent.jsonl", "--rates", "RATES"], "trace `absent.jsonl` cannot be read"),
        (["chat", "--rates", "absent.json"], "rates `absent.json` cannot be read"),
        (
            ["chat", "--rates", "RATES", "--fleets", "1p"],
            "expected a prefill and a decode worker, or one that does both",
        ),
        (["chat", "--rates", "RATES", "--policies", "best"], "`--policies` is `best`: expected some of round-robin"),
        (["chat", "--rates", "RATES", "--kv-cache-memory", "4KiB"], "4096"),
        (["chat", "--rates", "RATES", "--model", "absent/folder"], "absent/folder"),
        (["chat", "--rates", "RATES", "--rate", "0"], "rate"),
        ([], "trace"),
    ],
)
def test_a_mistake_is_one_sentence_with_what_was_expected(
    arguments: list[str], sentence: str, rates: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *(rates if word == "RATES" else word for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert sentence.lower() in err.lower()
    assert "Traceback" not in err
