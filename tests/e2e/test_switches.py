"""Variables without a flag, seen through `disagg up` in what its workers say of themselves."""

from __future__ import annotations

import pytest
from support.cluster.system import running
from support.model.interpreter import missing_interpreter

from disagg.kernels import native_attention

pytestmark = pytest.mark.processes

ONE_WORKER = ("--both", "1", "--prefill", "0", "--decode", "0", "--max-model-len", "128", "--threads", "1")


def log_of_workers(**environ: str) -> str:
    with running(*ONE_WORKER, env=environ) as system:
        status, _ = system.complete([1, 2, 3], max_tokens=2)
        assert status == 200
    return "".join(system.stderr)


@pytest.mark.skipif(not native_attention.is_loaded(), reason="the compiled helper is not built")
def test_each_switch_changes_what_serves() -> None:
    plain = log_of_workers()
    assert "decode attention: the compiled helper" in plain
    assert "fused QKV preprocessing in " in plain
    assert "layers are one call each" in plain
    switched = log_of_workers(DISAGG_NATIVE="off", DISAGG_FUSED_QKV="on", DISAGG_KERNELS="torch")
    assert "decode attention and KV writes: torch operations; the compiled helper is not built or left out" in switched
    assert "fused QKV preprocessing in " in switched
    assert "one call each" not in switched
    unfused = log_of_workers(DISAGG_FUSED_QKV="off")
    assert "fused QKV" not in unfused
    assert "one call each" not in unfused


@pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))
def test_another_backend_serves_where_it_is_asked_for() -> None:
    """In Triton's interpreter, which is the only way to see its kernels serve a CPU."""
    log = log_of_workers(DISAGG_KERNELS="triton", TRITON_INTERPRET="1")
    assert "decode attention and KV writes: Triton" in log
