"""`--dtype auto` on a CPU: float32 where the processor multiplies that faster, by rules that load does not sway."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.model.families import save_family

from disagg.engine.model.cpu_dtype import (
    Processor,
    linear_s,
    preferred_dtype,
    say_choice,
    share_of_memory,
    this_processor,
)
from disagg.engine.model.load import load_model

AVX2 = frozenset({"avx", "avx2", "fma"})
AVX512 = AVX2 | {"avx512f", "avx512_bf16"}
AMX = AVX512 | {"amx_tile", "amx_bf16"}
INTEL, AMD = "GenuineIntel", "AuthenticAMD"
PLENTY = 1 << 40


def chosen(flags: frozenset[str], vendor: str, checkpoint: str, *, machine: str = "x86_64") -> str:
    return preferred_dtype(Processor(machine, vendor, flags), PLENTY)(checkpoint, 1000)


@pytest.mark.parametrize(
    ("flags", "vendor", "checkpoint", "expected"),
    [
        (AVX2, INTEL, "bfloat16", "float32"),
        (AVX2, AMD, "bfloat16", "float32"),
        (AVX512, INTEL, "bfloat16", "float32"),
        (AVX512, AMD, "bfloat16", "bfloat16"),
        (AMX, INTEL, "bfloat16", "bfloat16"),
        (AMX, INTEL, "float16", "float32"),
        (AMX | {"amx_fp16"}, INTEL, "float16", "float16"),
        (AMX, INTEL, "float32", "float32"),
        (frozenset(), "", "bfloat16", "float32"),
    ],
)
def test_the_processor_decides(flags: frozenset[str], vendor: str, checkpoint: str, expected: str) -> None:
    assert chosen(flags, vendor, checkpoint) == expected


def test_an_unknown_processor_computes_in_what_the_checkpoint_has() -> None:
    assert chosen(frozenset({"asimd"}), "", "bfloat16", machine="aarch64") == "bfloat16"


def test_weights_that_take_most_of_the_memory_stay_as_they_are() -> None:
    prefer = preferred_dtype(Processor("x86_64", INTEL, AVX2), memory_nbytes=8000)
    assert prefer("bfloat16", 1000) == "float32"
    assert prefer("bfloat16", 1001) == "bfloat16"


def test_a_processor_is_read_from_cpuinfo(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: avx2 fma\n\nprocessor\t: 1\nflags\t: none\n")
    found = this_processor(path)
    assert (found.vendor, found.flags) == ("GenuineIntel", {"avx2", "fma"})


def test_workers_divide_the_memory_of_the_machine() -> None:
    assert share_of_memory(0.5) == share_of_memory(1.0) // 2


def times(**seconds: float) -> Callable[[torch.dtype], float]:
    return lambda dtype: seconds[str(dtype).removeprefix("torch.")]


def test_the_choice_is_told_with_its_speed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    say_choice("bfloat16", "float32", times(float32=1.0, bfloat16=2.0))
    assert [record.getMessage() for record in caplog.records] == [
        "computing in float32: 2.0 times as fast as bfloat16 here"
    ]


def test_a_choice_that_is_clearly_slower_here_is_a_warning_with_the_flag_to_give(
    caplog: pytest.LogCaptureFixture,
) -> None:
    say_choice("bfloat16", "float32", times(float32=1.0, bfloat16=0.5))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "bfloat16 is 2.0 times as fast here: give all workers `--dtype bfloat16`" in record.getMessage()


def test_a_checkpoint_in_float32_is_not_measured() -> None:
    say_choice("float32", "float32", times())


def test_a_linear_layer_is_timed_in_each_type() -> None:
    assert all(linear_s(dtype) > 0 for dtype in (torch.float32, torch.bfloat16))


def test_a_model_is_loaded_in_the_preferred_type_unless_one_is_told(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path)
    asked: list[tuple[str, int]] = []

    def prefer(checkpoint: str, num_parameters: int) -> str:
        asked.append((checkpoint, num_parameters))
        return "bfloat16"

    assert load_model(folder, prefer=prefer).dtype == "bfloat16"
    assert load_model(folder, dtype="float32", prefer=prefer).dtype == "float32"
    (question,) = asked
    assert question[0] == "float32"
    assert question[1] > 0
