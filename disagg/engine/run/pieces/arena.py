"""One memory for all tensors that pieces hand on, in all buckets: a place is taken again when its last reader ran.

Every replay of every bucket runs the same pieces and attentions in the same order. So a tensor needs its place from the
piece that makes it to the last piece or attention that reads it, and tensors whose spans do not meet may share one. It
is held as long as its graphs are: what a graph writes to is never given to anything else.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

ALIGNMENT: Final = 512
"""Bytes: what torch's allocator aligns to, so that kernels read a tensor as fast as from memory of its own."""

Key = tuple[str, int]
"""A value: the name of the part that made it, and the number of its memory among those the part made."""


@dataclass(frozen=True, slots=True)
class Span:
    """Memory of `nbytes` bytes that is written in part `first` and read up to part `last`, both included."""

    nbytes: int
    first: int
    last: int

    def meets(self, other: Span) -> bool:
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True, slots=True)
class Handed:
    """One output of a part: of its own making (`number` of its memory, `nbytes` long), or memory of argument `given`.

    `is_blank`: it was allocated and not written, for an attention to fill. None of them: it is no tensor.
    """

    number: int | None = None
    nbytes: int = 0
    given: int | None = None
    is_blank: bool = False


def look(args: Sequence[Any], outputs: Sequence[Any], blank: frozenset[int]) -> tuple[Handed, ...]:
    """What the outputs of a part that was called with `args` are made of."""
    given = {x.untyped_storage().data_ptr(): i for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
    own: dict[int, int] = {}
    handed = []
    for position, output in enumerate(outputs):
        if not isinstance(output, torch.Tensor):
            handed.append(Handed())
            continue
        storage = output.untyped_storage()
        if storage.data_ptr() in given:
            handed.append(Handed(given=given[storage.data_ptr()]))
            continue
        number = own.setdefault(storage.data_ptr(), len(own))
        handed.append(Handed(number, storage.nbytes(), is_blank=position in blank))
    return tuple(handed)


def spans(whole: torch.fx.GraphModule, handed: Mapping[str, Sequence[Handed]]) -> dict[Key, Span]:
    """How long each value is needed. `handed`: by the name of a part, what its outputs are; attentions have none."""
    order = {node.target: i for i, node in enumerate(n for n in whole.graph.nodes if n.op == "call_module")}
    end = len(order)
    values: dict[torch.fx.Node, Key | None] = {}
    found: dict[Key, Span] = {}

    def value_of(node: Any, outputs: Sequence[Handed], source: torch.fx.Node, position: int) -> Key | None:
        one = outputs[position]
        if one.given is not None:
            argument = source.args[one.given]
            return values.get(argument) if isinstance(argument, torch.fx.Node) else None
        return None if one.number is None else (str(source.target), one.number)

    for node in whole.graph.nodes:
        source, position = (node.args[0], node.args[1]) if node.target is operator.getitem else (node, 0)
        outputs = handed.get(str(source.target), ()) if isinstance(source, torch.fx.Node) else ()
        values[node] = value_of(node, outputs, source, position) if outputs and position < len(outputs) else None
        key = values[node]
        if key is None:
            continue
        nbytes = max(one.nbytes for one in handed[key[0]] if one.number == key[1])
        first = order[key[0]]
        readers = [order.get(user.target, end) for user in node.users if user.target is not operator.getitem]
        before = found.get(key, Span(nbytes, first, first))
        found[key] = Span(nbytes, first, max([before.last, *readers]))
    return found


def place(wanted: Mapping[Key, Span]) -> tuple[dict[Key, int], int]:
    """Where each value lies, and how large the arena is: the largest first, each at the lowest place that is free."""
    at: dict[Key, int] = {}
    total = 0
    for key in sorted(wanted, key=lambda key: (-wanted[key].nbytes, wanted[key].first, key)):
        span = wanted[key]
        taken = sorted(
            (at[other], at[other] + aligned(wanted[other].nbytes)) for other in at if span.meets(wanted[other])
        )
        offset = 0
        for start, stop in taken:
            if start - offset >= span.nbytes:
                break
            offset = max(offset, stop)
        at[key] = offset
        total = max(total, offset + aligned(span.nbytes))
    return at, total


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """Memory for the values of `wanted`, on `device`. The memory lives as long as this object."""

    def __init__(self, wanted: Mapping[Key, Span], device: torch.device) -> None:
        self._wanted = wanted
        self._at, self.nbytes = place(wanted)
        self._memory = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)

    def keep(self, part: str, handed: Sequence[Handed], outputs: Sequence[Any]) -> tuple[Any, ...]:
        """`outputs` of a part with what it made moved to its place; blank tensors get theirs, and are not copied."""
        return tuple(
            output if one.number is None else self._moved((part, one.number), one, output)
            for one, output in zip(handed, outputs, strict=True)
        )

    def _moved(self, key: Key, one: Handed, output: torch.Tensor) -> torch.Tensor:
        start, nbytes = self._at[key], output.untyped_storage().nbytes()
        assert nbytes <= self._wanted[key].nbytes, f"{key}: {nbytes} bytes, more than in the largest bucket"
        flat = self._memory[start : start + nbytes].view(output.dtype)
        there = flat.as_strided(output.shape, output.stride(), flat.storage_offset() + output.storage_offset())
        if not one.is_blank:
            _once(there).copy_(_once(output))
        return there


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """Each number in memory once: of what was expanded, the first."""
    return tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]
