"""The fused step between projection and attention: against what transformers' own modules hand to attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.model.interpreter import missing_interpreter
from support.oracles.sampling_rows import widest

import disagg.engine.model.hf  # noqa: F401  transformers is imported behind its guard
from disagg.kernels import native_layers, ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.dispatch import CALLS, forced
from disagg.kernels.native_attention import left_out
from disagg.kernels.qkv import HeadNorms, Rotary, head_norms, rotary
from disagg.kernels.scales import KVScales, quantise
from disagg.kernels.workspace import Workspace

BLOCK_SIZE = 4
RUNS = ((0, 5), (9, 1), (31, 3))  # (start, number) of queries: positions that are no neighbours


@pytest.fixture(params=["torch", "torch, avx2", "torch, avx512", "triton"])
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend; torch's once in torch operations and once in the compiled helper, where it serves the types."""
    backend, _, width = request.param.partition(", ")
    if backend == "triton" and (missing := missing_interpreter()):
        pytest.skip(missing)
    if width and not native_layers.is_loaded():
        pytest.skip("the compiled helper is not loaded")
    CALLS.clear()
    helper = widest({"avx2": 256, "avx512": 512}[width]) if width else left_out()
    with forced(backend), helper:
        yield backend
    assert CALLS[f"{backend}:preprocess_qkv"] > 0
    assert (CALLS["kernel:preprocess_qkv"] > 0) == (backend == "triton")
    assert width or not CALLS[native_layers.QKV]


class Paged:
    """A pool of three layers per slot, of which the second is used, and the places of the queries in it."""

    def __init__(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> None:
        shape = (40, 3, 2, num_kv_heads, BLOCK_SIZE, head_dim)
        self.memory = torch.zeros(shape).to(dtype)
        self.pool = self.memory[:, 1]
        slots = iter(np.random.default_rng(1).permutation(np.arange(2, 40)))
        runs = []
        for start, number in RUNS:
            table = np.array([next(slots) for _ in range(-(-(start + number) // BLOCK_SIZE))], np.int32)
            runs.append(QueryRun(table, start, number))
        self.batch = PagedBatch(tuple(runs), BLOCK_SIZE, None, 0)
        self.plan = ops.plan(self.batch, self.pool, torch.float32, Workspace())
        self.positions = torch.tensor([p for start, number in RUNS for p in range(start, start + number)])

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[num_queries, num_kv_heads, head_dim]` from where they belong, and that nothing else was written."""
        left, found = self.memory.float().clone(), []
        for run in self.batch.runs:
            for position in range(run.start, run.end):
                slot, offset = int(run.table[position // BLOCK_SIZE]), position % BLOCK_SIZE
                found.append(left[slot, 1, :, :, offset].clone())
                left[slot, 1, :, :, offset] = 0
        assert left.count_nonzero() == 0
        key, value = torch.stack(found, dim=1)
        return key, value


@dataclass(frozen=True)
class Family:
    name: str
    config: dict[str, Any]
    gain_offset: float = 0.0  # Gemma stores gain - 1


SMALL = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 10000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
FAMILIES = {
    "Llama": Family("Llama", {"head_dim": 16}),
    "Llama, linear RoPE": Family("Llama", {"head_dim": 16, "rope_parameters": LINEAR}),
    "Llama, llama3 RoPE": Family("Llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "Llama, yarn RoPE and bias": Family("Llama", {"rope_parameters": YARN, "attention_bias": True}),
    "Mistral": Family("Mistral", {"head_dim": 12}),
    "Qwen3, norms": Family("Qwen3", {"head_dim": 16}),
    "Gemma2": Family("Gemma2", {"head_dim": 16}),
    "Gemma3Text, norms that add one": Family("Gemma3", {"head_dim": 16, "layer_types": ["full_attention"]}, 1.0),
    "GptOss, yarn and bias": Family(
        "GptOss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": YARN}
    ),
}


class Unfused:
    """A random model of one layer, the input of its attention, and the Q, K and V it hands over."""

    def __init__(self, family: Family) -> None:
        import transformers

        torch.manual_seed(11)
        config_class = getattr(transformers, f"{family.name}TextConfig", None) or getattr(
            transformers, f"{family.name}Config"
        )
        model = getattr(transformers, f"{family.name}ForCausalLM")(config_class(**SMALL | family.config)).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        self.family, self.attention = family, model.model.layers[0].self_attn
        self.epsilon = getattr(model.config, "rms_norm_eps", 0.0)
        self.handed: list[torch.Tensor] = []
        transformers.AttentionInterface.register("handed over", self._take)
        model.set_attn_implementation("handed over")
        self.attention.register_forward_pre_hook(self._keep, with_kwargs=True)
        positions = torch.tensor([[p for start, number in RUNS for p in range(start, start + number)]])
        with torch.no_grad():
            model(input_ids=torch.randint(64, positions.shape), position_ids=positions, use_cache=False)
        self.angles = self._angles(model.model.rotary_emb, positions[0])

    def _keep(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.hidden = (args[0] if args else kwargs["hidden_states"])[0].detach()

    def _take(
        self, _module: object, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, None]:
        self.handed = [x[0].transpose(0, 1) for x in (query, key, value)]
        return torch.zeros(1, query.shape[2], query.shape[1], query.shape[3]), None

    def _angles(self, module: torch.nn.Module, positions: torch.Tensor) -> Rotary:
        kind = "full_attention_" if hasattr(module, "full_attention_inv_freq") else ""
        inverse_frequencies = getattr(module, f"{kind}inv_freq")
        return rotary(positions, inverse_frequencies, getattr(module, f"{kind}attention_scaling"))

    def packed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The projection without its bias `[num_queries, (4 + 2 * 2) * head_dim]`, and the bias."""
        parts = [self.attention.q_proj, self.attention.k_proj, self.attention.v_proj]
        weight = torch.cat([part.weight.detach() for part in parts])
        biases = [part.bias for part in parts]
        return self.hidden @ weight.T, None if biases[0] is None else torch.cat([b.detach() for b in biases])

    def norms(self) -> HeadNorms | None:
        if not hasattr(self.attention, "q_norm"):
            return None
        q, k = (x.weight.detach() + self.family.gain_offset for x in (self.attention.q_norm, self.attention.k_norm))
        return head_norms(q, k, None, epsilon=self.epsilon)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_q_k_and_v_are_what_its_own_modules_compute(name: str, served: str) -> None:
    unfused = Unfused(FAMILIES[name])
    query, key, value = unfused.handed
    paged = Paged(2, key.shape[2])
    qkv, bias = unfused.packed()
    out = ops.preprocess_qkv(
        qkv, paged.pool, paged.plan, num_heads=4, bias=bias, norms=unfused.norms(), angles=unfused.angles
    )
    torch.testing.assert_close(out, query, rtol=1e-5, atol=3e-6)
    stored_key, stored_value = paged.stored()
    torch.testing.assert_close(stored_key, key, rtol=1e-5, atol=3e-6)
    torch.testing.assert_close(stored_value, value, rtol=1e-5, atol=3e-6)


@dataclass(frozen=True)
class Shape:
    num_heads: int = 2
    num_kv_heads: int = 1
    head_dim: int = 8
    half: int = 4  # rotated pairs
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32
    tolerance: float = 3e-6


SHAPES = {
    "all rotated": Shape(),
    "a quarter rotated": Shape(3, 3, 20, 5 // 2),
    "none rotated": Shape(half=0),
    "primes": Shape(7, 7, 13, 5),
    "one element": Shape(1, 1, 1, 0),
    "128 wide": Shape(4, 2, 128, 64),
    "float16": Shape(4, 2, 16, 8, torch.float16, torch.float16, 4e-3),
    "bfloat16": Shape(4, 2, 16, 8, torch.bfloat16, torch.bfloat16, 4e-2),
    "bfloat16 stored wider": Shape(4, 2, 16, 8, torch.bfloat16, torch.float32, 4e-2),
}


def inputs(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, HeadNorms, Rotary]:
    torch.manual_seed(2)
    num_queries = sum(number for _, number in RUNS)
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    gains = [0.5 + torch.rand(shape.head_dim) for _ in range(3)]
    angles = torch.rand(num_queries, shape.half) * 6
    return (
        torch.randn(num_queries, width).to(shape.dtype),
        torch.randn(width).to(shape.dtype),
        head_norms(*gains, epsilon=1e-6),
        Rotary(angles.cos(), angles.sin()),
    )


def by_hand(
    shape: Shape, qkv: torch.Tensor, bias: torch.Tensor, norms: HeadNorms, angles: Rotary
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q, K and V in float64: pairs of dimensions as complex numbers, turned by multiplying."""
    x = (qkv.double() + bias.double()).numpy().reshape(len(qkv), -1, shape.head_dim)
    cuts = [shape.num_heads, shape.num_heads + shape.num_kv_heads]
    parts = []
    for kind, part in enumerate(np.split(x, cuts, axis=1)):
        size = np.sqrt((part**2).mean(-1, keepdims=True) + norms.epsilon)
        part = part / size * norms.gains[kind].double().numpy()
        if kind < 2:
            half = shape.half
            turned = (part[..., :half] + 1j * part[..., half : 2 * half]) * (angles.cos + 1j * angles.sin).numpy()[
                :, None
            ]
            part = np.concatenate([turned.real, turned.imag, part[..., 2 * half :]], axis=-1)
        parts.append(part)
    return parts[0], parts[1], parts[2]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_dtypes(name: str, served: str) -> None:
    shape = SHAPES[name]
    qkv, bias, norms, angles = inputs(shape)
    paged = Paged(shape.num_kv_heads, shape.head_dim, shape.stored)
    out = ops.preprocess_qkv(
        qkv, paged.pool, paged.plan, num_heads=shape.num_heads, bias=bias, norms=norms, angles=angles
    )
    assert out.dtype == shape.dtype
    found = (out, *paged.stored())
    for mine, theirs in zip(found, by_hand(shape, qkv, bias, norms, angles), strict=True):
        np.testing.assert_allclose(mine.double().numpy(), theirs, atol=shape.tolerance, rtol=shape.tolerance)


def test_the_projection_may_be_a_slice_of_a_wider_one(served: str) -> None:
    shape = Shape()
    qkv, *_ = inputs(shape)
    wide = torch.randn(len(qkv), qkv.shape[1] + 5)
    wide[:, 2:-3] = qkv
    outs = []
    for given in (qkv, wide[:, 2:-3]):
        paged = Paged(1, 8)
        outs.append((ops.preprocess_qkv(given, paged.pool, paged.plan, num_heads=2), *paged.stored()))
    for one, two in zip(*outs, strict=True):
        assert torch.equal(one, two)


def test_k_and_v_are_stored_over_their_scales(served: str) -> None:
    shape = Shape(num_kv_heads=3)
    qkv, *_ = inputs(shape)
    scales = KVScales(torch.tensor([0.5, 2.0, 4.0]), torch.tensor([8.0, 0.25, 1.0]))
    paged = Paged(3, 8)
    ops.preprocess_qkv(qkv, paged.pool, paged.plan, num_heads=2, scales=scales)
    key, value = paged.stored()
    assert torch.equal(key, qkv.view(9, 8, 8)[:, 2:5] / scales.key[:, None])
    assert torch.equal(value, qkv.view(9, 8, 8)[:, 5:] / scales.value[:, None])


def test_eight_bit_kv_in_torch_and_refused_by_the_interpreter(served: str) -> None:
    qkv, *_ = inputs(Shape())
    paged = Paged(1, 8, torch.float8_e4m3fn)
    if served == "triton":
        with pytest.raises(RuntimeError, match="wrongly"):
            ops.preprocess_qkv(qkv, paged.pool, paged.plan, num_heads=2)
        CALLS["kernel:preprocess_qkv"] += 1
        return
    ops.preprocess_qkv(qkv, paged.pool, paged.plan, num_heads=2)
    assert torch.equal(paged.stored()[0], qkv.view(9, 4, 8)[:, 2:3].to(torch.float8_e4m3fn).float())


def test_int8_kv_is_rounded_clamped_and_counted(served: str) -> None:
    qkv, *_ = inputs(Shape())
    qkv[0, 16], qkv[4, 24] = 300.0, -1e4  # K of the first query, V of the fifth
    counter = torch.zeros((), dtype=torch.int64)
    scales = KVScales(torch.tensor([0.02]), torch.tensor([0.03]), counter)
    paged = Paged(1, 8, torch.int8)
    ops.preprocess_qkv(qkv, paged.pool, paged.plan, num_heads=2, scales=scales)
    expected = [
        quantise(qkv.view(9, 4, 8)[:, at : at + 1], torch.int8, torch.tensor(s)) for at, s in ((2, 0.02), (3, 0.03))
    ]
    beyond = sum(int((qkv.view(9, 4, 8)[:, at].abs() > 127 * s).sum()) for at, s in ((2, 0.02), (3, 0.03)))
    for stored, mine in zip(paged.stored(), expected, strict=True):
        assert torch.equal(stored, mine.float())
    assert int(counter) == beyond >= 2


@pytest.mark.parametrize("wrong", ["no norm", "no bias", "angles of the next position", "half of the pairs"])
def test_a_step_left_out_is_noticed(wrong: str, served: str) -> None:
    shape = Shape()
    qkv, bias, norms, angles = inputs(shape)
    given: dict[str, Any] = {"bias": bias, "norms": norms, "angles": angles}
    given |= {
        "no norm": {"norms": None},
        "no bias": {"bias": None},
        "angles of the next position": {"angles": Rotary(angles.cos.roll(1, 0), angles.sin.roll(1, 0))},
        "half of the pairs": {"angles": Rotary(angles.cos[:, :2].contiguous(), angles.sin[:, :2].contiguous())},
    }[wrong]
    paged = Paged(1, 8)
    out = ops.preprocess_qkv(qkv, paged.pool, paged.plan, num_heads=2, **given)
    assert np.abs(out.numpy() - by_hand(shape, qkv, bias, norms, angles)[0]).max() > 1e-2


@pytest.mark.skipif(not native_layers.is_loaded(), reason="the compiled helper is not loaded")
def test_the_helper_takes_float32_and_stores_nothing_outside_the_pool() -> None:
    qkv, bias, norms, angles = inputs(Shape())
    paged = Paged(1, 8)
    CALLS.clear()
    ops.preprocess_qkv(qkv, paged.pool, paged.plan, num_heads=2, bias=bias, norms=norms, angles=angles)
    assert CALLS[native_layers.QKV] == 1
    assert not native_layers.serves_qkv(qkv.bfloat16(), paged.pool)
    paged.plan.writes.elements[3] = 1 << 40  # type: ignore[union-attr]
    with pytest.raises(IndexError, match="of a pool of 40"):
        ops.preprocess_qkv(qkv, paged.pool, paged.plan, num_heads=2)
