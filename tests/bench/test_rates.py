"""Rates of a machine: what is made of steps, loads and CPU seconds, and that `simulate` reads what is printed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disagg.bench import rates as bench_rates
from disagg.bench.pair import BenchError
from disagg.bench.play import PlayedRequest
from disagg.bench.rates import EngineClock, measure_link
from disagg.bench.running import processes_below
from disagg.bench.serving import AT_ONCE, LONG, SHORT, LoadCosts, ServingCosts, costs_of, cpu_s
from disagg.cli.main import main
from disagg.config.load import load
from disagg.config.settings import RatesSettings
from disagg.engine.commands import AttemptKey, FailedEvent, FinishedEvent, Release, Serve, TokensEvent
from disagg.simulate.rates import rates_from_json


class FakeEngine:
    """Computes prompts of up to 8 tokens a step and a token of each answer; its clock is what steps should take."""

    def __init__(self) -> None:
        self.prompts: dict[AttemptKey, tuple[int, int]] = {}
        self.answers: dict[AttemptKey, int] = {}
        self.now = 0.0

    def handle(self, command: Serve | Release) -> list[Any]:
        if isinstance(command, Serve):
            self.prompts[command.key] = len(command.prompt), command.sampling.max_tokens
        else:
            self.answers.pop(command.key, None)
        return []

    def step(self) -> list[Any]:
        events: list[Any] = []
        self.now += 0.001 * len(self.answers)
        events += [TokensEvent(key, 1, (5,), ()) for key in self.answers]
        if self.prompts:
            key, (size, max_tokens) = next(iter(self.prompts.items()))
            self.now += 0.5 + 0.01 * min(size, 8)
            self.prompts[key] = size - 8, max_tokens
            if size <= 8:
                del self.prompts[key]
                events.append(TokensEvent(key, 0, (5,), ()))
                if max_tokens == 1:
                    events.append(FinishedEvent(key, 1, "length"))
                else:
                    self.answers[key] = max_tokens
        return events


@pytest.fixture
def clocked() -> tuple[FakeEngine, EngineClock]:
    settings = load(RatesSettings, {"max_num_seqs": 6, "max_num_batched_tokens": 64, "rounds": 2}, {})
    engine = FakeEngine()
    clock = EngineClock(engine, settings, 200)  # type: ignore[arg-type]
    clock._clock = lambda: engine.now
    return engine, clock


def test_steps_with_prompts_are_timed_whole_whatever_steps_they_take(clocked: tuple[FakeEngine, EngineClock]) -> None:
    assert clocked[1].prefill().points == (
        (16, pytest.approx(2 * 0.5 + 0.16)),
        (64, pytest.approx(8 * 0.5 + 0.64)),
    )


def test_steps_of_answers_are_timed_once_all_of_them_have_begun(clocked: tuple[FakeEngine, EngineClock]) -> None:
    engine, clock = clocked
    assert clock.decode().points == tuple((n, pytest.approx(0.001 * n)) for n in (1, 2, 4, 6))
    assert not engine.answers


def test_a_prompt_that_the_engine_gives_up_ends_the_measurement_with_its_words() -> None:
    failing = SimpleNamespace(handle=lambda _: [], step=lambda: [FailedEvent(AttemptKey("0" * 32, 1), 400, "too long")])
    with pytest.raises(BenchError, match="too long"):
        EngineClock(failing, load(RatesSettings, {}, {}), 100).prefill()  # type: ignore[arg-type]


def test_what_things_cost_is_found_again_in_the_loads_that_they_make() -> None:
    true = ServingCosts(0.0002, 0.008, 0.005, 0.0004, 0.0001)
    prefill_s, decode_s = 0.011, 0.006

    def cost(num_tokens: int, at_once: int) -> LoadCosts:
        return LoadCosts(
            prefill=prefill_s + true.step_cpu_s + true.handoff_cpu_s,
            decode=true.handoff_cpu_s + (num_tokens - 1) * (decode_s + true.step_cpu_s),
            front=true.request_cpu_s + num_tokens * (true.message_cpu_s / at_once + true.token_cpu_s),
        )

    loads = [cost(SHORT, 1), cost(LONG, 1), cost(SHORT, AT_ONCE), cost(LONG, AT_ONCE)]
    found = costs_of(*loads, prefill_s, decode_s)
    for name in ServingCosts.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(true, name)), name


def test_costs_that_a_busy_machine_hides_are_none_and_not_below() -> None:
    nothing = LoadCosts(0.001, 0.001, 0.001)
    found = costs_of(nothing, nothing, nothing, nothing, 0.01, 0.01)
    assert found == ServingCosts(0.0, 0.0, 0.001, 0.0, 0.0)


def test_link_figures_explain_both_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = bench_rates.CASES
    seconds = {name: 0.002 + cases[name].nbytes / 4e9 for name in ("a", "c")}
    monkeypatch.setattr(bench_rates, "_transfer_s", lambda plane, case, rounds: seconds[case])
    assert measure_link("shm", 3) == (pytest.approx(4e9), pytest.approx(0.002))


def test_this_process_is_found_below_itself_and_its_cpu_seconds_grow() -> None:
    before = cpu_s(os.getpid())
    assert os.getpid() in dict(processes_below(os.getpid())).values()
    sum(i * i for i in range(300_000))
    assert cpu_s(os.getpid()) > before


def test_a_played_request_tells_its_first_token_and_its_gaps() -> None:
    played = PlayedRequest([0.5, 0.7, 0.7])
    assert played.ttft_s == 0.5
    assert played.gaps == pytest.approx([0.2, 0.0])


@pytest.fixture
def threads() -> Iterator[None]:
    """A worker sets torch's threads for its whole process, which this one is not."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("threads")
def test_what_is_measured_of_the_bundled_model_is_what_simulate_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_rates, "measure_link", lambda plane, rounds: (1e9, 0.001))
    command = ["bench", "rates", "--no-serving", "--threads", "1", "--max-num-seqs", "2", "--rounds", "1"]
    assert main([*command, "--max-num-batched-tokens", "64", "--max-model-len", "256"]) == 0
    told = json.loads(capsys.readouterr().out)
    rates = rates_from_json(told)
    assert [size for size, _ in rates.prefill_step_s.points] == [16, 64]
    assert [size for size, _ in rates.decode_step_s.points] == [1, 2]
    assert told["about"]["clock"] == "CPU"
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(told))
    assert main(["simulate", "chat", "--rates", str(path), "--requests", "5", "--policies", "round-robin"]) == 0
