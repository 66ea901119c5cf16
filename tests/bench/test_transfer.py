"""The transfer benchmark: what it moves, what it makes of its samples, and that it notices wrong bytes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.cluster.warm import WarmPopen
from support.tools import ROOT

import disagg
from disagg.bench import pair, transfer
from disagg.bench.cases import CASES, Case
from disagg.bench.circumstances import commit
from disagg.bench.contenders import missing_package
from disagg.bench.overlap import Overlap, measure_overlap
from disagg.bench.pair import BenchError, Pair, Sample
from disagg.bench.side import ContenderSide
from disagg.bench.transfer import contenders_of, summarise
from disagg.cli.main import main


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_the_same_bytes_as_regions_and_as_slots(name: str) -> None:
    case = CASES[name]
    blocks = case.draw_blocks(np.random.default_rng(1))
    assert len(set(blocks.tolist())) == case.num_blocks
    assert 2 <= blocks.min() <= blocks.max() < case.pool_blocks
    for by_layer, num_pieces in ((True, case.num_layers * case.num_blocks), (False, case.num_blocks)):
        numbers, nbytes = case.pieces(blocks, by_layer)
        assert len(set(numbers.tolist())) == len(numbers) == num_pieces
        assert num_pieces * nbytes == case.nbytes
        assert (numbers.max() + 1) * nbytes <= case.pool_nbytes


def test_the_cases_are_the_published_ones() -> None:
    assert {name: (c.num_layers, c.num_blocks, c.region_nbytes) for name, c in CASES.items()} == {
        "a": (32, 64, 65536),
        "b": (26, 512, 16384),
        "c": (26, 8, 16384),
        "d": (1, 64, 2097152),
    }


def test_a_summary_is_medians_with_their_spread() -> None:
    samples = [Sample(seconds, cpu_s=0.1, operations=64, digest_s=0.002) for seconds in (0.010, 0.030, 0.020)]
    result = summarise("shm", CASES["d"], True, samples)
    assert (result.p50_ms, result.best_ms, result.spread, result.rounds) == (20.0, 10.0, 1.0, 3)
    assert result.gbps == pytest.approx((128 << 20) / 0.02 / 1e9, abs=0.001)
    assert result.cpu_s_per_gb == pytest.approx(0.1 / ((128 << 20) / 1e9), abs=0.001)


def test_what_is_not_installed_is_left_out_and_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "missing_package", lambda plane: "nixl_cu12" if plane == "nixl" else None)
    assert contenders_of(["memcpy", "shm", "nixl"], "both") == [("memcpy", None), ("shm", False), ("shm", True)]
    assert contenders_of(["shm"], "on") == [("shm", True)]
    assert "nixl left out: the package nixl_cu12 is not installed" in capsys.readouterr().err
    assert missing_package("shm") is None


@pytest.fixture
def warm_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides that need not load torch first."""
    monkeypatch.setattr(pair, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": WarmPopen}))


@pytest.mark.processes
@pytest.mark.usefixtures("warm_sides")
def test_one_run_of_the_command_moves_and_compares_every_byte(capsys: pytest.CaptureFixture[str]) -> None:
    planes = ("memcpy", "shm", "tcp")
    command = ["bench", "transfer", "--planes", ",".join(planes), "--cases", "c", "--rounds", "1"]
    command += ["--digests", "on", "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"command", "commit", "machine", "python", "load_before", "load_after"} <= printed.keys()
    results = printed["results"]
    assert {(r["plane"], r["digests"]) for r in results} == {
        ("memcpy", None),
        ("shm", True),
        ("tcp", True),
    }
    required = {"plane", "case", "digests", "gbps", "p50_ms", "cpu_s_per_gb", "operations"}
    assert all(required <= set(r) and r["gbps"] > 0 and r["operations"] > 0 for r in results)
    assert {r["operations"] for r in results if r["plane"] == "memcpy"} == {26 * 8}
    assert all(r["operations"] <= 8 for r in results if r["plane"] in ("shm", "tcp"))


class Memory(ContenderSide):
    """Anonymous memory, cut into slots."""

    by_layer = False

    def __init__(self, case: Case) -> None:
        super().__init__(True, "memory")
        self.case, self.memory = case, np.zeros(case.pool_nbytes, dtype=np.uint8)

    async def open(self, case: Case, secret: bytes) -> dict: ...
    async def prepare(self, number: int, mine: np.ndarray, theirs: np.ndarray) -> None: ...
    async def move(self) -> int: ...


def test_what_landed_in_an_earlier_round_does_not_pass_in_a_later_one() -> None:
    """Of every 4 KiB of every block: one that is not copied again is seen."""
    case = Case("small", 2, 3, 8 << 10)
    side, blocks = Memory(case), np.array([5, 2, 9])
    side.fill(seed=1)
    others, landed = side.hashes(np.array([3, 4])), side.rows(blocks)[0][blocks].copy()
    for number in range(3):
        side.refresh(blocks, number)
        pages = side.rows(blocks)[0][blocks].reshape(-1, 4096)
        assert (pages != landed.reshape(-1, 4096)).any(axis=1).all()
        assert (pages <= 0x3F).all(), "a number that is not finite"
        assert side.hashes(np.array([3, 4])) == others
        landed = side.rows(blocks)[0][blocks].copy()


def test_a_measurement_names_its_commit_or_its_version(tmp_path: Path) -> None:
    assert commit(ROOT / "disagg").split("-")[0] in commits_of(ROOT)
    assert commit(tmp_path / "site-packages" / "disagg") == f"version {disagg.__version__}"
    (tmp_path / ".git").touch()  # no checkout that git knows
    assert commit(tmp_path / "disagg") == f"version {disagg.__version__}"


def commits_of(folder: Path) -> str:
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    whole = subprocess.run(git, capture_output=True, text=True).stdout
    return whole or f"version {disagg.__version__}"  # the sources alone, without their history


@pytest.mark.processes
@pytest.mark.usefixtures("warm_sides")
def test_wrong_bytes_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("memcpy-slots", False, CASES["c"])
    ask = pair._both

    def forget_to_move(requests: list[dict]) -> list:
        if requests[0]["do"] == "move":
            return [{"end": 1.0, "cpu_s": 0.0, "operations": 0}] * 2
        return ask(requests)

    monkeypatch.setattr(pair, "_both", forget_to_move)
    with pytest.raises(BenchError, match="8 pieces differ"):
        pair.repeat(0, np.random.default_rng(0))
    pair.close()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--cases", "a,x"], "`--cases` is `a,x`"), (["--planes", "rdma"], "`rdma`"), (["--digests", "of"], "`of`")],
)
def test_unknown_names_are_refused_in_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "transfer", *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.usefixtures("warm_sides")
def test_both_ways_of_a_chunked_prompt_move_what_its_model_needs_and_compare_it() -> None:
    result = measure_overlap(CASES["c"], "shm", "windowed", chunk_s=0.005, rounds=1, seed=1)
    block = CASES["c"].slot_nbytes
    assert (result.nbytes, result.last_nbytes) == (2 * block, block)
    assert result.exposed_s > 0
    assert result.exposed_after_prefill_s > 0


def test_an_overlap_is_judged_by_the_speed_of_the_same_bytes_after_prefill() -> None:
    result = Overlap("shm", "full", 80_000_000, 10_000_000, exposed_s=0.005, exposed_after_prefill_s=0.020)
    assert result.gbps == pytest.approx(4.0)
    assert result.bound_s == pytest.approx(1.3 * 0.0025 + 0.005)
    assert result.share == pytest.approx(0.25)
