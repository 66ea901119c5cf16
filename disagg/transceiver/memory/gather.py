"""The packed path: gather units from strided memory into canonical bytes, scatter them into other strided memory.

A unit's canonical bytes are `[layer][K, V][head][token][dim]` of one rectangle in the wire's number format. Copies move
whole numbers as integers of their width, so what is not converted arrives bit for bit, NaN payloads included. Each call
is a handful of operations, however many units it moves: one for memory in which layers and halves lie at even
distances, as in our slots, else one per layer and half.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from disagg.kernels.digest import digest
from disagg.transceiver.layout.cut import Ints, Rectangle
from disagg.transceiver.layout.strides import ELEMENT_NBYTES, SCALED, GroupStrides, Half, Layout
from disagg.transceiver.memory.convert import is_lossless, narrow, widen, wire_dtype
from disagg.transceiver.wire.messages.values import GroupSemantics

_RAW: Final = {4: torch.int32, 2: torch.int16, 1: torch.uint8}

Buffer = torch.Tensor | npt.NDArray[np.uint8]
"""One axis: a tensor of any type, or bytes, which may be read-only where nothing is written."""

_View = torch.Tensor | npt.NDArray[Any]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of `tensor` as one axis of its elements: the buffer that its strides and offset refer to."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


class Area:
    """One rectangle of one rank's memory, seen by units."""

    def __init__(
        self,
        layout: Layout,
        buffers: Sequence[Buffer],
        number: int,
        group: GroupSemantics,
        rectangle: Rectangle,
        unit: int,
    ) -> None:
        """`number`: the group's in `layout`. `rectangle` is in positions of the model-wide `group`.

        Raises `ValueError` when this rank does not hold all of the rectangle.
        """
        held = layout.groups[number]
        first_layer, num_layers, first_head, num_heads = rectangle
        wanted = group.layers[first_layer : first_layer + num_layers]
        heads = range(first_head - held.first_head, first_head - held.first_head + num_heads)
        is_held = set(wanted) <= set(held.layers) and heads.start >= 0 and heads.stop <= held.num_heads
        if not is_held or len(wanted) != num_layers or held.head_dim != group.head_dim:
            raise ValueError(f"group {number}: rectangle {rectangle} is not held here")
        layers = [held.layers.index(layer) for layer in wanted]
        self.dtype = held.dtype
        self.unit_shape = (num_layers, 2, num_heads, unit, held.head_dim)
        self.scales = _scales(held, layers, heads)
        self._unit = unit
        per_slot = layout.block_size // unit
        self._views = [
            _view(buffers, held, [[held.halves[i][k] for k in halves] for i in chosen], heads, (per_slot, unit))
            for chosen, halves in _even_parts(held, layers)
        ]
        self._parts = [
            (slice(layers.index(chosen[0]), layers.index(chosen[-1]) + 1), slice(halves[0], halves[-1] + 1))
            for chosen, halves in _even_parts(held, layers)
        ]

    @property
    def num_operations(self) -> int:
        """Copies that one `read` or `write` makes."""
        return len(self._views)

    def read(self, slots: Ints, tokens: Ints) -> torch.Tensor:
        """Units at (slot, first token): `[n, layers, 2, heads, unit, dim]` in this memory's format, as a fresh copy."""
        units = tokens // self._unit
        if len(self._views) == 1:
            return self._typed(_take(self._views[0], slots, units))
        values = torch.empty((len(slots), *self.unit_shape), dtype=_RAW[ELEMENT_NBYTES[self.dtype]])
        for (layers, halves), view in zip(self._parts, self._views, strict=True):
            values[:, layers, halves] = _take(view, slots, units)
        return self._typed(values)

    def write(self, slots: Ints, tokens: Ints, values: torch.Tensor) -> None:
        """Store units, of the shape and format that `read` gives, at (slot, first token)."""
        units = tokens // self._unit
        raw = values.view(_RAW[values.element_size()])
        for (layers, halves), view in zip(self._parts, self._views, strict=True):
            _put(view, slots, units, raw[:, layers, halves])

    def _typed(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(getattr(torch, self.dtype))


def _scales(held: GroupStrides, layers: Sequence[int], heads: range) -> torch.Tensor | None:
    """float32 `[layers, 2, heads, 1, 1]`; None where there is none to apply."""
    if not held.scales:
        return None
    chosen = [[[half[head] for head in heads] for half in held.scales[layer]] for layer in layers]
    return torch.tensor(chosen, dtype=torch.float32)[..., None, None]


def _even_parts(held: GroupStrides, layers: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """(layers, halves) that one strided view can show: all of them, or each half of each layer."""
    if _is_even([[held.halves[layer][k] for k in (0, 1)] for layer in layers]):
        return [(list(layers), [0, 1])]
    return [([layer], [k]) for layer in layers for k in (0, 1)]


def _is_even(halves: Sequence[Sequence[Half]]) -> bool:
    first = halves[0][0]
    layer_step, half_step = _steps(halves)
    return all(
        half == Half(first.buffer, first.offset + i * layer_step + k * half_step, *_inner(first))
        for i, pair in enumerate(halves)
        for k, half in enumerate(pair)
    )


def _steps(halves: Sequence[Sequence[Half]]) -> tuple[int, int]:
    """Elements from one layer to the next, and from K to V."""
    first = halves[0][0].offset
    layer_step = halves[1][0].offset - first if len(halves) > 1 else 0
    return layer_step, halves[0][1].offset - first if len(halves[0]) > 1 else 0


def _inner(half: Half) -> tuple[int, int, int, int]:
    return half.slot, half.head, half.token, half.dim


def _view(
    buffers: Sequence[Buffer],
    held: GroupStrides,
    halves: Sequence[Sequence[Half]],
    heads: range,
    cut: tuple[int, int],
) -> _View:
    """`[slot, unit in slot, layer, half, head, token, dim]`; `cut` = (units per slot, tokens per unit)."""
    first, (layer_step, half_step), (per_slot, unit) = halves[0][0], _steps(halves), cut
    shape = (held.num_slots, per_slot, len(halves), len(halves[0]), len(heads), unit, held.head_dim)
    strides = (first.slot, unit * first.token, layer_step, half_step, first.head, first.token, first.dim)
    offset = first.offset + heads.start * first.head
    buffer, nbytes = buffers[first.buffer], ELEMENT_NBYTES[held.dtype]
    if isinstance(buffer, torch.Tensor) and buffer.device.type != "cpu":
        raw = buffer.view(_RAW[nbytes])
        return raw.as_strided(shape, strides, raw.storage_offset() + offset)
    flat_bytes = buffer.view(torch.uint8).numpy() if isinstance(buffer, torch.Tensor) else buffer
    in_bytes = tuple(nbytes * stride for stride in strides)
    return np.ndarray(shape, f"i{nbytes}" if nbytes > 1 else "u1", flat_bytes, nbytes * offset, in_bytes)


def _take(view: _View, slots: Ints, units: Ints) -> torch.Tensor:
    """`view[slots, units]`, copied. On the CPU numpy does it ten times as fast as torch, at the pace of memcpy."""
    if isinstance(view, torch.Tensor):
        return view[torch.from_numpy(slots), torch.from_numpy(units)].contiguous()
    return torch.from_numpy(np.ascontiguousarray(view[slots, units]))


def _put(view: _View, slots: Ints, units: Ints, values: torch.Tensor) -> None:
    if isinstance(view, torch.Tensor):
        view[torch.from_numpy(slots), torch.from_numpy(units)] = values.to(view.device)
    else:
        view[slots, units] = values.numpy()


class Tally:
    """A number that several threads add to: landing threads use the same packer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = 0

    def add(self, amount: int) -> None:
        with self._lock:
            self.total += amount


# --- both ends ----------------------------------------------------------------------------------------------------


class Packer:
    """The sender's end of one rectangle for one receiver: units to canonical bytes."""

    def __init__(self, source: Area, receiver_dtype: str, receiver_scales: torch.Tensor | None = None) -> None:
        """`receiver_scales` as in `Area.scales`, used when the receiver is of eight bits and the sender is not."""
        self._source = source
        self.wire_dtype = wire_dtype(source.dtype, receiver_dtype)
        self._scales = receiver_scales if self.wire_dtype != source.dtype else None
        self._saturated = Tally()

    @property
    def unit_nbytes(self) -> int:
        return _nbytes(self._source.unit_shape, self.wire_dtype)

    @property
    def num_saturated(self) -> int:
        """Numbers that were gathered as the largest of the wire's format."""
        return self._saturated.total

    def gather(self, slots: Ints, tokens: Ints) -> torch.Tensor:
        """The canonical bytes of these units, uint8 `[n, unit_nbytes]`, on the CPU or where the source lies."""
        values = self._source.read(slots, tokens)
        if values.dtype != getattr(torch, self.wire_dtype):
            values, num_saturated = narrow(values, self.wire_dtype, self._scales)
            self._saturated.add(num_saturated)
        return values.reshape(-1).view(torch.uint8).reshape(len(slots), self.unit_nbytes)


class Unpacker:
    """The receiver's end of one rectangle from one sender: canonical bytes to units."""

    def __init__(self, destination: Area, sender_dtype: str, sender_scales: torch.Tensor | None = None) -> None:
        """`sender_scales` as in `Area.scales`, used when the sender is of eight bits and has other scales than we."""
        self._destination = destination
        self.wire_dtype = wire_dtype(sender_dtype, destination.dtype)
        same_scales = _are_equal(sender_scales, destination.scales)
        self.is_lossless = is_lossless(sender_dtype, destination.dtype, same_scales=same_scales)
        self._is_converted = self.wire_dtype != destination.dtype or (
            self.wire_dtype == sender_dtype and sender_dtype in SCALED and not same_scales
        )
        self._scales = sender_scales
        self._saturated = Tally()

    @property
    def can_reread(self) -> bool:
        """Whether the wire's bytes can be made from what lies in the destination."""
        return self.is_lossless or not self._is_converted

    @property
    def unit_nbytes(self) -> int:
        return _nbytes(self._destination.unit_shape, self.wire_dtype)

    @property
    def num_saturated(self) -> int:
        """Numbers that were stored as the largest of the destination's format."""
        return self._saturated.total

    def scatter(self, rows: torch.Tensor, slots: Ints, tokens: Ints) -> int:
        """Store canonical bytes, uint8 `[n, unit_nbytes]`, at (slot, first token). Returns how many saturated."""
        num_saturated = 0
        values = rows.view(getattr(torch, self.wire_dtype)).reshape(len(slots), *self._destination.unit_shape)
        if self._is_converted:
            exact = widen(values, "float32", self._scales)
            values, num_saturated = narrow(exact, self._destination.dtype, self._destination.scales)
            self._saturated.add(num_saturated)
        self._destination.write(slots, tokens, values)
        return num_saturated

    def reread(self, slots: Ints, tokens: Ints) -> torch.Tensor:
        """The wire's bytes of units as they lie in the destination: what its digest is made of."""
        assert self.can_reread, "a landing that rounds is hashed before its conversion"
        values = self._destination.read(slots, tokens).to(getattr(torch, self.wire_dtype))
        return values.reshape(-1).view(torch.uint8).reshape(len(slots), self.unit_nbytes)


def digests(rows: torch.Tensor) -> list[int]:
    """xxh3-64 of each unit's canonical bytes, uint8 `[n, unit_nbytes]`."""
    return [digest(row) for row in rows.cpu().numpy()]


def _nbytes(shape: Sequence[int], dtype: str) -> int:
    nbytes = ELEMENT_NBYTES[dtype]
    for extent in shape:
        nbytes *= extent
    return nbytes


def _are_equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Are two sets of scales the same? None is 1.0 everywhere."""
    if a is None or b is None:
        present = a if b is None else b
        return present is None or bool((present == 1).all())
    return torch.equal(a, b)
