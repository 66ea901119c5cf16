"""A CUDA graph's rules on a CPU: what a capture recorded is run again on the very tensors it was given.

Every torch operation and kernel launch is recorded as it is called, with its tensors and numbers. A replay runs no
Python of the model: it repeats the list, into the memory that the capture made. So a tensor that was made outside and
not copied into a static buffer keeps the value of the capture, as on a GPU, and the tokens are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
# What Python reads, what has a shape that depends on data, and what is copied from the host (`lift_fresh`: a tensor
# of Python's numbers). A real capture fails on them.
SYNCS = frozenset(
    {"_local_scalar_dense", "item", "nonzero", "unique2", "_unique2", "masked_select", "is_nonzero", "lift_fresh"}
)
EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty"})


class CaptureFailed(RuntimeError):
    """What a CUDA device refuses during capture."""


@dataclass
class Node:
    """One call. `made`: tensors that it allocated; None: it writes to what it was given."""

    call: Callable[[], Any]
    given: list[tuple[torch.Tensor, int]]
    made: list[torch.Tensor] | None

    def run(self) -> None:
        for tensor, address in self.given:
            assert tensor.data_ptr() == address, "a tensor of the graph moved"
        result = self.call()
        if self.made is not None:
            fresh = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
            for old, new in zip(self.made, fresh, strict=True):
                assert old.shape == new.shape, f"{tuple(new.shape)} in a replay, {tuple(old.shape)} at capture"
                old.copy_(new)


def tensors(*values: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]


class Recorder(TorchDispatchMode):
    def __init__(self, nodes: list[Node]) -> None:
        super().__init__()
        self.nodes = nodes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in SYNCS:
            raise CaptureFailed(f"{name} waits for the device")
        given = tensors(args, kwargs)
        if name.startswith("index") and any(x.dtype == torch.bool for x in given[1:]):
            raise CaptureFailed(f"{name} by a mask waits for the device")
        result = func(*args, **kwargs)
        known = {x.untyped_storage().data_ptr() for x in given if x.numel()}
        results = [x for x in tensors(result) if x.numel()]
        if func._schema.is_mutable:
            self.add(lambda: func(*args, **kwargs), given, None)
        elif name in EMPTY:
            self.nodes.append(Node(lambda: (), [], None))
        elif results and not all(x.untyped_storage().data_ptr() in known for x in results):
            self.add(lambda: func(*args, **kwargs), given, tensors(result))
        return result  # what is left are views of what is recorded

    def add(self, call: Callable[[], Any], given: list[torch.Tensor], made: list[torch.Tensor] | None) -> None:
        self.nodes.append(Node(call, [(x, x.data_ptr()) for x in given], made))


@contextmanager
def recorded_launches(recorder: Recorder) -> Iterator[None]:
    """Triton's launches are no torch operations, and what its interpreter does to run one is."""
    from disagg.kernels import triton_backend

    launch = triton_backend.launch

    def record(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if 0 in grid:
            return
        from torch.utils._python_dispatch import _disable_current_modes

        def call() -> None:
            launch(name, kernel, grid, *args, **constants)

        with _disable_current_modes():
            call()
        recorder.add(call, tensors(args), None)

    triton_backend.launch = record  # type: ignore[assignment]
    try:
        yield
    finally:
        triton_backend.launch = launch


@dataclass
class FakeGraph:
    nodes: list[Node] = field(default_factory=list)
    output: Any = None

    def capture(self, run: Callable[[], Any]) -> Any:
        recorder = Recorder(self.nodes)
        with recorded_launches(recorder), recorder:
            self.output = run()
        self.forget()
        return self.output

    def replay(self) -> None:
        for node in self.nodes:
            node.run()
        self.forget()

    def forget(self) -> None:
        """Graphs share their memory: nothing but the output outlives a replay."""
        kept = {x.untyped_storage().data_ptr() for x in tensors(self.output)}
        for node in self.nodes:
            for made in node.made or ():
                if made.is_floating_point() and made.untyped_storage().data_ptr() not in kept:
                    made.fill_(float("nan"))

    @property
    def nbytes(self) -> int:
        return sum(made.nbytes for node in self.nodes for made in node.made or ())


@dataclass
class FakeGraphs:
    """A `GraphMaker`."""

    graphs: list[FakeGraph] = field(default_factory=list)

    def new(self) -> FakeGraph:
        self.graphs.append(FakeGraph())
        return self.graphs[-1]

    @property
    def nbytes(self) -> int:
        return sum(graph.nbytes for graph in self.graphs)
