"""Linear layers on a CPU with packed weights, which a matmul of few rows reads much faster.

In float32, where a worker has one thread, the compiled helper multiplies (`native_matmul`), elsewhere oneDNN, with
weights in an order of its own. Microseconds a call on one core of a Xeon with AVX-512, oneDNN's and the helper's (with
numbers that bfloat16 holds): 256 x 1536 for 8 rows 136 and 51, for 32 306 and 171, for 512 2887 and 2825; 4096 x 2048
for 8 rows 1976 and 1021, for 128 15400 and 15000. oneDNN's call alone takes 20 to 25.


oneDNN per call of 2048 x 768 on one core of a Zen 5, plain and packed: float32 0.74 and 0.43 ms for 8 rows, 1.63 and
1.04 for 32, 17.9 and 15.7 for 512; bfloat16 0.44 and 0.18 ms, 0.80 and 0.58, 8.0 and 7.5.
"""

from __future__ import annotations

import torch

from disagg.cache.host_memory import available_nbytes
from disagg.kernels import native_matmul
from disagg.kernels.dispatch import CALLS

# oneDNN chooses a weight's order for a number of rows. The order for 32 was within 5 % of the best for every number
# from 1 to 512 in both dtypes.
ROWS_HINT = 32
EXACT_ROWS = 16
STEPS_PER_OCTAVE = 8
"""oneDNN compiles a matmul for every number of rows, 2 ms and half a MiB for each shape of weights, and keeps a
thousand: prompts of all lengths up to 512 held 1.1 GiB. So more rows than `EXACT_ROWS` are filled up to one of eight
numbers per doubling, which adds at most an eighth of the work, 4 % of it on average."""
# An embedding that is also the head stays as it is, so packing the head costs its size again: only where it is little.
MAX_SHARED_FRACTION = 0.1


class NativeLinear(torch.nn.Module):
    """`linear` with its weight packed for the compiled helper; the original is not kept. For inference, one thread."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = None if linear.bias is None else linear.bias.detach()
        self.packed = native_matmul.pack(linear.weight.detach(), bias)
        self.weight = _no_weight(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS["packed_linear"] += 1
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        return native_matmul.multiply(rows, self.packed).view(*x.shape[:-1], self.out_features)


class PackedLinear(torch.nn.Module):
    """`linear` with its weight packed for oneDNN; the original is not kept. For inference on a CPU."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self.weight = _no_weight(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:  # oneDNN refuses no rows: a step in which no prompt ends wants no logits
            return x.new_empty(*x.shape[:-1], self.out_features)
        CALLS["packed_linear"] += 1
        rows = x.reshape(-1, self.in_features)
        count = len(rows)
        if spare := filled_up(count) - count:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, spare))
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, self._packed, self._bias, "none", [], "")
        return out[:count].view(*x.shape[:-1], self.out_features)


def _no_weight(weight: torch.Tensor) -> torch.Tensor:
    """Keeps shape and dtype for callers that inspect them. The values are NaN, so that accidental use shows."""
    return weight.detach().new_full((1, 1), float("nan")).expand(weight.shape)


def packed(linear: torch.nn.Linear) -> NativeLinear | PackedLinear:
    """`linear` as it is fastest here; `can_pack` its dtype."""
    return NativeLinear(linear) if native_matmul.serves(linear.weight.dtype) else PackedLinear(linear)


def filled_up(num_rows: int) -> int:
    """How many rows a matmul of `num_rows` computes."""
    if num_rows <= EXACT_ROWS:
        return num_rows
    step = max(1, (1 << (num_rows - 1).bit_length() - 1) // STEPS_PER_OCTAVE)
    return -(-num_rows // step) * step


# Whether oneDNN computes in a dtype depends on the CPU; where it does not, its operators raise. AVX2 alone has neither.
SUPPORT = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def can_pack(dtype: torch.dtype) -> bool:
    """Whether the compiled helper multiplies, or this torch has oneDNN and its two operators, and they take `dtype`."""
    if native_matmul.serves(dtype):
        return True
    mkldnn = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return False
    supported = getattr(mkldnn, SUPPORT.get(dtype, ""), None)
    return dtype == torch.float32 or (supported is not None and bool(supported()))


def pack_linears(model: torch.nn.Module) -> int:
    """Replace every plain `Linear` of a model on the CPU by a packed one, where torch and CPU can; how many.

    Each original is freed as its copy is made. Subclasses of `Linear` stay: they may do more than multiply.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    spare = MAX_SHARED_FRACTION * available_nbytes()
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or not can_pack(child.weight.dtype):
                continue
            if owners[id(child.weight)] == 1 or child.weight.nbytes <= spare:
                setattr(parent, name, packed(child))
                count += 1
    return count
