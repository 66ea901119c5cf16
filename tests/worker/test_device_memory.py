"""A GPU's memory divided among weights, steps and KV, and the sentences where it does not suffice."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.model.families import save_family

from disagg.cache.errors import BudgetTooSmall
from disagg.config.settings import WorkerSettings
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.step_memory import StepMemory, StepMemoryShort
from disagg.worker import device_memory
from disagg.worker.device_memory import kv_budget, plan_steps, report_capture

GIB = 1 << 30
STEPS = StepMemory(activations=GIB, decode_graphs=GIB)


def settings(**told: object) -> WorkerSettings:
    return WorkerSettings(device="cuda:0", max_num_seqs=4, max_num_batched_tokens=32, **told)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB in all, 60 of them free beside the weights."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * GIB, 80 * GIB))


def test_kv_gets_what_weights_and_steps_leave_of_the_workers_share() -> None:
    assert kv_budget(settings(), StepMemory()) == pytest.approx(44 * GIB)
    assert kv_budget(settings(), STEPS) == pytest.approx(42 * GIB)
    assert kv_budget(settings(memory_share=0.5), STEPS) == pytest.approx(20 * GIB)
    assert kv_budget(settings(kv_cache_memory=58 * GIB), STEPS) == 58 * GIB


def test_kv_and_steps_that_do_not_fit_together_are_refused_with_the_numbers() -> None:
    with pytest.raises(StepMemoryShort) as refusal:
        kv_budget(settings(kv_cache_memory=58 * GIB + 1), STEPS)
    for said in ("58 GiB", "2 GiB: activations 1 GiB, decode graphs 1 GiB", "60 GiB of `cuda:0`", str(58 * GIB)):
        assert said in str(refusal.value)
    with pytest.raises(BudgetTooSmall, match=r"44 GiB are left .* nothing is left for KV; lower `--max-num-seqs`"):
        kv_budget(settings(), StepMemory(activations=45 * GIB))


def test_a_cpu_worker_plans_no_device_memory(tmp_path: Path) -> None:
    model = SimpleNamespace(device=torch.device("cpu"))
    assert plan_steps(WorkerSettings(), "both", model, tmp_path) == StepMemory()  # type: ignore[arg-type]


@pytest.mark.parametrize(("role", "told"), [("decode", {}), ("prefill", {"piecewise_graphs": True})])
def test_what_a_role_captures_is_planned(
    role: str, told: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_family("llama", tmp_path)
    loaded = load_model(folder)
    facts = {name: getattr(loaded, name) for name in LoadedModel.__slots__} | {"device": torch.device("cuda:0")}
    monkeypatch.setattr(device_memory, "has_triton", lambda: True)
    processors = SimpleNamespace(multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with caplog.at_level(logging.INFO):
        plan = plan_steps(settings(**told), role, SimpleNamespace(**facts), folder)  # type: ignore[arg-type]
    assert (plan.decode_graphs > 0, plan.pieces > 0) == (role == "decode", role == "prefill")
    assert f"steps are planned to take {plan.in_words()}" in caplog.messages
    eager = plan_steps(settings(enforce_eager=True, **told), role, SimpleNamespace(**facts), folder)  # type: ignore[arg-type]
    assert eager.graphs == 0
    assert plan.total > eager.total


def test_graphs_that_take_more_than_planned_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        report_capture(GIB, STEPS)
        report_capture(GIB + 1, STEPS)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
