"""Compile the Triton kernels for an NVIDIA architecture, which needs no GPU, and print what ptxas says of each.

    python compile_kernels.py [architecture, as in 90] [name ...]

One JSON line per variant: registers per thread, bytes spilled to memory, bytes of shared memory, and whether global
memory is read in vectors. Run it in a process of its own: where the interpreter is on, triton compiles nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from disagg.engine.sampling import triton as sampling
from disagg.kernels.triton.attention import attention_kernel, merge_kernel
from disagg.kernels.triton.backend import COPY_BLOCK, QUERIES_PER_PROGRAM
from disagg.kernels.triton.copies import rows_kernel, units_kernel, write_kernel
from disagg.kernels.triton.launch import cut
from disagg.kernels.triton.qkv import qkv_kernel

POINTERS = {
    "table": "i32",
    "runs": "i32",
    "tiles": "i32",
    "slots": "i32",
    "offsets": "i32",
    "source_rows": "i64",
    "target_rows": "i64",
    "source_at": "i64",
    "target_at": "i64",
    "counter": "i64",
}
SAMPLING = dict.fromkeys(("drawn", "seeds", "positions", "top_ks"), "i64") | {"keys": "i32", "limits": "i32"}
SAMPLING |= {"top_ps": "fp64"}
FLOAT_POINTERS = (
    "sink_logits key_scales value_scales split_out split_max split_sum source_scales target_scales gains cos sin"
)
FLOATS = ("scale", "softcap", "epsilon", "largest")


def signature(kernel: Any, constants: dict[str, object], tensors: dict[str, str]) -> dict[str, str]:
    """Types of all arguments: those in `tensors` as said, the others as their name tells."""
    types = {name: f"*{kind}" for name, kind in (POINTERS | dict.fromkeys(FLOAT_POINTERS.split(), "fp32")).items()}
    types |= dict.fromkeys(FLOATS, "fp32") | {name: f"*{kind}" for name, kind in tensors.items()}
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}


def report(kernel: Any, constants: dict[str, object], tensors: dict[str, str], arch: int, warps: int) -> dict[str, Any]:
    """Compile as at a launch with aligned tensors, their strides multiples of 16."""
    types = signature(kernel, constants, tensors)
    aligned = [i for i, (name, kind) in enumerate(types.items()) if kind.startswith("*") or "stride" in name]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if types[kernel.arg_names[i]] != "constexpr"}
    source = ASTSource(kernel, types, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    ptx = made.asm["ptx"]
    told = assemble(ptx)
    return {
        "registers": int(re.findall(r"Used (\d+) registers", told)[0]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", told))),
        "shared": made.metadata.shared,
        "vectors": bool(re.search(r"cp\.async\.cg|ld\.global\S*\.v[24]|ld\.global\S*b(64|128)", ptx)),
        "tensor_cores": bool(re.search(r"mma", ptx)),
    }


def assemble(ptx: str) -> str:
    """What ptxas reports; Triton brings its own."""
    target = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    # Of Triton's two this is the newer: it reads every version of PTX that Triton may write.
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr


def attention(
    dtype: str, *, head_dim: int = 128, heads_per_kv: int = 4, decode: bool, pool: str | None = None, **features: bool
) -> tuple[Any, dict[str, object], dict[str, str], int]:
    how = cut(head_dim=head_dim, heads_per_kv=heads_per_kv, itemsize=4 if dtype == "fp32" else 2, decode=decode)
    constants: dict[str, object] = {
        "R": heads_per_kv,
        "T": 16,
        "D": head_dim,
        "DP": how.padded_dim,
        "BLOCK_Q": how.num_queries,
        "BLOCK_M": how.rows,
        "BLOCK_N": how.keys,
        "WIDE": False,
    }
    constants["INTEGERS"] = pool == "i8"
    for name in ("HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINK_LOGITS", "HAS_SCALES", "SPLIT"):
        constants[name] = features.get(name.removeprefix("HAS_").lower(), False)
    absent = {"HAS_SINK_LOGITS": "sink_logits", "HAS_SCALES": "key_scales value_scales", "SPLIT": "split_max split_sum"}
    constants |= {name: None for flag, names in absent.items() if not constants[flag] for name in names.split()}
    tensors = {"query": dtype, "pool": pool or dtype, "out": "fp32" if constants["SPLIT"] else dtype}
    return attention_kernel, constants, tensors, how.num_warps


def copies() -> dict[str, tuple[Any, dict[str, object], dict[str, str], int]]:
    heads: dict[str, object] = {"H": 8, "D": 128, "HAS_SCALES": False, "SATURATE": False}
    heads |= {"INTEGERS": False, "COUNT": False}
    scaled = heads | {"HAS_SCALES": True, "SATURATE": True, "COUNT": True}
    integers = scaled | {"INTEGERS": True}
    without: dict[str, object] = {"key_scales": None, "value_scales": None, "counter": None}
    units: dict[str, object] = {"H": 8, "U": 16, "D": 128, "BLOCK": COPY_BLOCK, "SATURATE": False}
    units |= {"SOURCE_INTEGERS": False, "TARGET_INTEGERS": False}
    units |= {"HAS_SOURCE_SCALES": False, "HAS_TARGET_SCALES": False, "source_scales": None, "target_scales": None}
    rows: dict[str, object] = {
        "BLOCK": COPY_BLOCK,
        "SOURCE_INDEXED": True,
        "TARGET_INDEXED": False,
        "target_rows": None,
    }
    qkv: dict[str, object] = {"HQ": 32, "HALF": 64, "HP": 64, "RP": 1, "BLOCK_T": QUERIES_PER_PROGRAM, "NORMED": 3}
    qkv |= {"HAS_BIAS": True}
    bf16 = {"key": "bf16", "value": "bf16", "qkv": "bf16", "query": "bf16", "bias": "bf16", "pool": "bf16"}
    fp8, int8 = bf16 | {"pool": "fp8e4nv"}, bf16 | {"pool": "i8"}
    halves = {"source": "i16", "target": "i16"}
    return {
        "write_kv": (write_kernel, heads | without | {"BLOCK": 1024}, bf16, 4),
        "write_kv fp8": (write_kernel, scaled | {"BLOCK": 1024}, fp8, 4),
        "write_kv int8": (write_kernel, integers | {"BLOCK": 1024}, int8, 4),
        "gather_slots": (rows_kernel, rows, {"source": "i64", "target": "i64"}, 4),
        "copy_units": (units_kernel, units | {"source_stride_dim": 1, "target_stride_dim": 1}, halves, 4),
        "preprocess_qkv": (qkv_kernel, heads | without | qkv, bf16, 4),
        "preprocess_qkv fp8": (qkv_kernel, scaled | qkv, fp8, 4),
        "preprocess_qkv int8": (qkv_kernel, integers | qkv, int8, 4),
    }


def variants() -> dict[str, tuple[Any, dict[str, object], dict[str, str], int]]:
    merge: dict[str, object] = {"D": 128, "DP": 128, "SP": 16, "HAS_SINK_LOGITS": True}
    return {
        "decode": attention("bf16", decode=True, window=True),
        "decode split": attention("bf16", decode=True, split=True),
        "decode sinks softcap": attention("fp16", decode=True, window=True, sink_logits=True, softcap=True),
        "decode fp8": attention("bf16", decode=True, pool="fp8e4nv", scales=True, split=True),
        "decode int8": attention("bf16", decode=True, pool="i8", scales=True, split=True),
        "decode 256": attention("bf16", decode=True, head_dim=256, heads_per_kv=2, window=True),
        "decode 512": attention("bf16", decode=True, head_dim=512, heads_per_kv=8),
        "decode fp32": attention("fp32", decode=True, head_dim=64),
        "prefill": attention("bf16", decode=False),
        "prefill 64": attention("bf16", decode=False, head_dim=64, heads_per_kv=8, window=True, sink_logits=True),
        "prefill 80": attention("fp16", decode=False, head_dim=80, heads_per_kv=7),
        "prefill 256": attention("bf16", decode=False, head_dim=256, heads_per_kv=2, window=True, softcap=True),
        "prefill 512": attention("bf16", decode=False, head_dim=512, heads_per_kv=8),
        "prefill fp8": attention("bf16", decode=False, pool="fp8e4nv", scales=True),
        "prefill int8": attention("bf16", decode=False, pool="i8", scales=True),
        "prefill fp32": attention("fp32", decode=False, head_dim=64, window=True),
        "merge_splits": (merge_kernel, merge, {"out": "bf16"}, 4),
        "sampling": (sampling.sample_kernel, {"BLOCK": sampling.BLOCK}, SAMPLING, sampling.NUM_WARPS),
        **copies(),
    }


if __name__ == "__main__":
    arch, chosen = int((sys.argv[1:] or ["90"])[0]), sys.argv[2:]
    for name, (kernel, constants, tensors, warps) in variants().items():
        if not chosen or name in chosen:
            print(json.dumps({"name": name, **report(kernel, constants, tensors, arch, warps)}), flush=True)
