"""A CUDA graph's rules on a CPU: what a capture recorded is run again on the very tensors it was given.

Every torch operation and kernel launch is recorded as it is called, with its tensors and numbers. A replay runs no
Python of the model: it repeats the list, into the memory that the capture made. So a tensor that was made outside and
not copied into a static buffer keeps the value of the capture, as on a GPU, and the tokens are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
# What Python reads, what has a shape that depends on data, and what is copied from the host (`lift_fresh`: a tensor
# of Python's numbers). A real capture fails on them.
SYNCS = frozenset(
    {"_local_scalar_dense", "item", "nonzero", "unique2", "_unique2", "masked_select", "is_nonzero", "lift_fresh"}
)
# Reads the groups' sizes on the host, save for bfloat16 on devices that have a kernel for it.
GROUPED = frozenset({"_grouped_mm", "transformers::grouped_mm_fallback"})
EMPTY = frozenset({"empty", "empty_like", "empty_strided", "new_empty"})


class CaptureFailed(RuntimeError):
    """What a CUDA device refuses during capture."""


class Outside:
    """A tensor that a graph was given and does not hold: its owner must, else a replay reads freed memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.address, self.like = tensor.data_ptr(), torch.empty_like(tensor, device="meta")
        self.shape, self.strides, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()

    def get(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "a tensor of the graph was freed"
        fresh = torch.empty(0, dtype=self.like.dtype).set_(storage, self.offset, self.shape, self.strides)
        assert fresh.data_ptr() == self.address, "a tensor of the graph moved"
        return fresh


@dataclass
class Node:
    """One call. `made`: tensors that it allocated; None: it writes to what it was given."""

    call: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    made: list[torch.Tensor] | None

    def let_go(self, inside: set[int]) -> None:
        """Hold no tensor but those whose memory (`inside`, by storage address) the graph allocated."""

        def weaken(x: Any) -> Any:
            is_outside = isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inside
            return Outside(x) if is_outside else x

        self.args, self.kwargs = tree_map(weaken, (self.args, self.kwargs))

    def run(self) -> None:
        args, kwargs = tree_map(lambda x: x.get() if isinstance(x, Outside) else x, (self.args, self.kwargs))
        result = self.call(*args, **kwargs)
        if self.made is not None:
            for old, new in zip(self.made, tensors(result), strict=True):
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
        if name in GROUPED and given[0].dtype != torch.bfloat16:
            raise CaptureFailed(f"{name} in {given[0].dtype} waits for the device")
        if name.startswith("index") and any(x.dtype == torch.bool for x in given[1:]):
            raise CaptureFailed(f"{name} by a mask waits for the device")
        result = func(*args, **kwargs)
        known = {x.untyped_storage().data_ptr() for x in given if x.numel()}
        results = [x for x in tensors(result) if x.numel()]
        if func._schema.is_mutable:
            self.nodes.append(Node(func, args, kwargs, None))
        elif name in EMPTY:
            self.nodes.append(Node(lambda: tensors(result), (), {}, tensors(result)))
        elif results and not all(x.untyped_storage().data_ptr() in known for x in results):
            self.nodes.append(Node(func, args, kwargs, tensors(result)))
        return result  # what is left are views of what is recorded


@contextmanager
def recorded_launches(recorder: Recorder) -> Iterator[None]:
    """Triton's launches are no torch operations, and what its interpreter does to run one is."""
    from disagg.kernels.triton import backend as triton_backend

    launch = triton_backend.launch

    def record(name: str, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        if 0 in grid:
            return
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():
            launch(name, kernel, grid, *args, **constants)
        recorder.nodes.append(Node(lambda *given: launch(name, kernel, grid, *given, **constants), args, {}, None))

    triton_backend.launch = record  # type: ignore[assignment]
    try:
        yield
    finally:
        triton_backend.launch = launch


@dataclass
class FakeGraph:
    nodes: list[Node] = field(default_factory=list)
    output: Any = None
    kept: int = 0
    peak: int = 0

    def capture(self, run: Callable[[], Any]) -> Any:
        recorder = Recorder(self.nodes)
        with recorded_launches(recorder), recorder:
            self.output = run()
        self.kept, self.peak = lifetimes(self.nodes, self.output)
        inside = {made.untyped_storage().data_ptr() for node in self.nodes for made in node.made or ()}
        for node in self.nodes:
            node.let_go(inside)
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


def lifetimes(nodes: Sequence[Node], output: Any) -> tuple[int, int]:
    """Bytes of the graph's memory that outlive its capture, and the most that was in use at once.

    Memory is in use from the call that made it to the last that was given it, as in a pool of graphs.
    """
    spans: dict[int, tuple[int, int, int]] = {}
    for number, node in enumerate(nodes):
        for made in node.made or ():
            storage = made.untyped_storage()
            spans[storage.data_ptr()] = (storage.nbytes(), number, number)
        for given in tensors(node.args, node.kwargs):
            if (known := spans.get(given.untyped_storage().data_ptr())) is not None:
                spans[given.untyped_storage().data_ptr()] = (*known[:2], number)
    kept = {x.untyped_storage().data_ptr() for x in tensors(output)} & spans.keys()
    ends = {at: len(nodes) if at in kept else last for at, (_, _, last) in spans.items()}
    used = [
        sum(nbytes for at, (nbytes, first, _) in spans.items() if first <= number <= ends[at])
        for number in range(len(nodes))
    ]
    return sum(spans[at][0] for at in kept), max(used, default=0)


@dataclass
class FakeGraphs:
    """A `GraphMaker`."""

    graphs: list[FakeGraph] = field(default_factory=list)

    def new(self) -> FakeGraph:
        self.graphs.append(FakeGraph())
        return self.graphs[-1]

    @property
    def nbytes(self) -> int:
        """What a pool that all graphs share grew to: what earlier ones keep stays, all else is used again."""
        kept = most = 0
        for graph in self.graphs:
            most = max(most, kept + graph.peak)
            kept += graph.kept
        return most
