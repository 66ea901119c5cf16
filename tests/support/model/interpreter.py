"""Whether Triton kernels can run here without a GPU."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def missing_interpreter() -> str | None:
    """Why they cannot: a reason to skip. `tests/conftest.py` switches the interpreter on where there is no GPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install --no-deps triton==3.7.1"
    import triton

    if not triton.knobs.runtime.interpret:
        return "kernels are compiled here, not interpreted: tests/gpu runs them on the device"
    return _probe()


def _probe() -> str | None:
    """A kernel of one line: triton 3.6's interpreter fails with NumPy 2.4, on anything."""
    import torch
    from support.model.probe_kernel import add_one
    from triton.runtime.interpreter import InterpreterError

    x = torch.zeros(4)
    try:
        add_one[(1,)](x, 4)
    except InterpreterError as error:
        return f"triton's interpreter does not work here: {error}"
    return None if bool((x == 1).all()) else "triton's interpreter adds wrongly here"
