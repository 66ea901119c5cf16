"""A whole decoder layer over the decode rows of a step, in one call of the compiled helper (`native_decoder.c`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from disagg.kernels import native
from disagg.kernels.dispatch import CALLS
from disagg.kernels.native_attention import AttentionLayout, DecodeRows, layout_of
from disagg.kernels.native_layers import Projection, projection_of
from disagg.kernels.native_matmul import PackedWeight
from disagg.kernels.qkv import HeadNorms, Rotary

DECODER: Final = "native:decode_layer"


class _Norm(ctypes.Structure):
    """The struct Norm of native_decoder.c."""

    _fields_ = (("gain", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class Decoder(ctypes.Structure):
    """The struct Decoder of native_decoder.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "gated", "activation")),
        *((name, _Norm) for name in ("before_attention", "after_attention", "before_gated", "after_gated")),
        *((name, ctypes.c_void_p) for name in ("qkv", "output", "gate_up", "down")),
        ("projection", Projection),
        ("attention", AttentionLayout),
        *((name, ctypes.c_void_p) for name in ("bias", "gains", "sinks", "pool")),
        ("pool_size", ctypes.c_int64),
    )


def _functions() -> ctypes.CDLL | None:
    library = native.library()
    if library is None:
        return None
    array, number = ctypes.c_void_p, ctypes.c_int64
    library.disagg_decode_layer.argtypes = (array, number, *(array,) * 8)
    library.disagg_decode_layer.restype = number
    library.disagg_decoder_room.argtypes = (array, number)
    library.disagg_decoder_room.restype = number
    return library


_library = _functions()


@dataclass(frozen=True, slots=True, eq=False)
class LayerNorm:
    """RMS norm over a row: `gain` float32 `[hidden]`."""

    gain: torch.Tensor
    epsilon: float

    def __post_init__(self) -> None:
        assert self.gain.dtype == torch.float32
        assert self.gain.is_contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class LayerParts:
    """x + after_attention(attention(before_attention(x))), and of that y: y + after_gated(gated(before_gated(y))).

    `bias`: of the packed projection, before `norms` and rotation; `sinks`: sink logits `[num_heads]`; both float32 and
    contiguous. `activation`: as `native_layers.gate` has it.
    """

    before_attention: LayerNorm
    after_attention: LayerNorm | None
    before_gated: LayerNorm
    after_gated: LayerNorm | None
    qkv: PackedWeight
    output: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    activation: int
    num_heads: int
    half: int
    scale: float
    softcap: float | None
    bias: torch.Tensor | None
    norms: HeadNorms | None
    sinks: torch.Tensor | None

    def over(self, pool: torch.Tensor) -> Decoder:
        """For calls over `pool`, as `native_attention` takes it, in float32. Both must outlive what is made."""
        heads, dim = self.num_heads, pool.shape[4]
        return Decoder(
            *(self.qkv.depth, self.down.depth, self.activation),
            *map(_norm, (self.before_attention, self.after_attention, self.before_gated, self.after_gated)),
            *(weight.address for weight in (self.qkv, self.output, self.gate_up, self.down)),
            projection_of(pool, self.qkv.num_outputs, heads, self.half, self.norms),
            layout_of(pool, heads, (heads * dim, dim), self.scale, self.softcap),
            *map(_address, (self.bias, None if self.norms is None else self.norms.gains, self.sinks, pool)),
            pool.shape[0] * pool.stride(0),
        )


def _norm(norm: LayerNorm | None) -> _Norm:
    return _Norm(None, 0.0) if norm is None else _Norm(norm.gain.data_ptr(), norm.epsilon)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def decode_layer(
    decoder: Decoder, x: torch.Tensor, angles: Rotary, at: npt.NDArray[np.int64], decodes: DecodeRows
) -> torch.Tensor:
    """`x` float32 `[n, hidden]`, contiguous, one row per query of `decodes`, through the layer: the same shape.

    `at[i]`: the element of the pool where K of row i's head 0 goes; IndexError where one lies outside.
    """
    assert _library is not None
    assert x.is_contiguous()
    assert len(x) == len(at) == len(decodes.rows) == len(angles.cos)
    CALLS[DECODER] += 1
    out, address = torch.empty_like(x), ctypes.addressof(decoder)
    room = torch.empty(_library.disagg_decoder_room(address, len(x)))
    given = (x.data_ptr(), angles.cos.data_ptr(), angles.sin.data_ptr(), at.ctypes.data)
    lists = (decodes.rows.ctypes.data, decodes.tables.ctypes.data)
    failed = _library.disagg_decode_layer(address, len(x), *given, *lists, room.data_ptr(), out.data_ptr())
    if failed > 0:
        raise AssertionError(f"a query at {decodes.rows[failed - 1, 3]} needs a block that has no slot")
    if failed < 0:
        raise IndexError(f"K and V of row {-1 - failed} to element {at[-1 - failed]} of a pool")
    return out
