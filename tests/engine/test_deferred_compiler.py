"""Transformers and its models without torch's compiler, which comes when it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch._dynamo

import disagg
from disagg.engine.model.deferred_compiler import COMPILER, compiler_deferred

LOADED = """
import sys
from pathlib import Path
from disagg.engine.model.load import load_model
model = load_model(Path({folder!r}), device="cpu")
print(sorted({{"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "triton"}} & set(sys.modules)))
{more}
"""
COMPILE = """
import torch
print(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1)).item(), "torch._dynamo" in sys.modules)
"""
MASKS = """
from disagg.engine.model.hf import transformers
own = transformers.AutoModelForCausalLM.from_pretrained({folder!r}, attn_implementation="sdpa")
from transformers.masking_utils import TransformGetItemToIndex
with TransformGetItemToIndex():
    print(type(TransformGetItemToIndex()).__module__, own(input_ids=torch.zeros(1, 70, dtype=torch.long)).logits.shape)
"""
DEMO = str(Path(disagg.__file__).parent / "demo_model")


def said(more: str) -> list[str]:
    """What a fresh Python prints that loads the bundled model and runs `more`."""
    code = LOADED.format(folder=DEMO, more=more)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_model_loads_without_the_compiler() -> None:
    assert said("") == ["[]"]


def test_the_compiler_comes_when_it_is_asked_for() -> None:
    assert said(COMPILE)[1:] == ["1.0 True"]


def test_transformers_own_masks_find_the_real_context() -> None:
    line = said(COMPILE + MASKS.format(folder=DEMO))[-1]
    assert line.startswith("torch._dynamo._trace_wrapped_higher_order_op torch.Size([1, 70")


def test_a_compiler_that_is_loaded_stays() -> None:
    before = sys.modules[COMPILER]
    with compiler_deferred():
        assert sys.modules[COMPILER] is before
    assert torch._dynamo is before
