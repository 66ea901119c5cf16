"""Every implementation of the sampler against a plain definition and against the others, at extremes of every field."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles.sampling_oracle import choose
from support.oracles.sampling_rows import implementations, inputs, logits, widest

from disagg.api.request.fields import parse_params
from disagg.engine import philox
from disagg.engine.sampler import sample
from disagg.engine.sampling import native, plain
from disagg.engine.sampling.rows import Sampled, SampleInput, plan_row
from disagg.engine.sampling.seen import SeenTokens
from disagg.kernels import native as helper
from disagg.transceiver.wire.messages.values import Sampling

needs_helper = pytest.mark.skipif(
    not native.is_loaded(), reason="the compiled helper is not built: no C compiler when the package was installed"
)
IMPLEMENTATIONS = implementations()


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values)[None]


def agree(one: Sampled, other: Sampled) -> bool:
    """Tokens are equal; log-probabilities, sums in another order, to six digits."""
    if one.logprobs is None or other.logprobs is None:
        return one == other
    pairs = [(0, one.logprobs.logprob), *one.logprobs.top], [(0, other.logprobs.logprob), *other.logprobs.top]
    is_close = all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) for (_, a), (_, b) in zip(*pairs, strict=True))
    return is_close and one.token_id == other.token_id and [i for i, _ in pairs[0]] == [i for i, _ in pairs[1]]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_accepted_extremes_give_the_defined_token_in_every_implementation(data: st.DataObject) -> None:
    values = data.draw(logits())
    asked = data.draw(inputs(len(values)))
    row = plan_row(asked, len(values))
    results = [implementation(tensor(values), [row])[0] for implementation in IMPLEMENTATIONS.values()]
    assert all(one.finite and one.error is None and 0 <= one.token_id < len(values) for one in results)
    assert all(agree(one, results[0]) for one in results)
    if (choice := choose(values, asked)).is_sure:
        assert results[0].token_id == choice.token_id
    for one in results:
        assert one.logprobs is None or all(math.isfinite(value) for _, value in one.logprobs.top)


def test_most_choices_at_the_extremes_are_sure() -> None:
    """Negative control: the definition says something of most rows, and another token would be seen."""
    values = np.random.default_rng(1).standard_normal(200).astype(np.float32)
    rows = [SampleInput(Sampling(max_tokens=9, seed=i, top_p=0.9), i, (), ()) for i in range(100)]
    sure = [(choice, row) for row in rows if (choice := choose(values, row)).is_sure]
    assert len(sure) > 90
    moved = [choose(np.roll(values, 1), row).token_id for _, row in sure]
    assert moved != [choice.token_id for choice, _ in sure]


@pytest.mark.parametrize("size", [32_000, 151_936])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.9}, {"top_k": 50}, {"top_k": 1000, "top_p": 0.5, "min_p": 0.01}, {"top_p": 0.9999}],
    ids=lambda options: "-".join(options) or "free",
)
def test_whole_vocabularies_give_one_token_in_every_implementation(size: int, options: dict[str, float]) -> None:
    rng = np.random.default_rng(size)
    values = np.stack([rng.standard_normal(size) * scale for scale in (0.0, 0.5, 2.5, 10)]).astype(np.float32)
    asked = [SampleInput(Sampling(max_tokens=9, seed=i, **options), i, (), ()) for i in range(4)]  # type: ignore[arg-type]
    rows = [plan_row(one, size) for one in asked]
    results = {name: use(torch.from_numpy(values), rows) for name, use in IMPLEMENTATIONS.items()}
    assert all(result == results["plain"] for result in results.values())
    choices = [choose(row, one) for row, one in zip(values, asked, strict=True)]
    assert sum(choice.is_sure for choice in choices) >= 2
    for choice, one in zip(choices, results["plain"], strict=True):
        assert not choice.is_sure or choice.token_id == one.token_id


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-308, "top_p": 0.9},
        {"temperature": 5e-324, "min_p": 1},
        {"repetition_penalty": 1e-46, "top_p": 0.9},
        {"repetition_penalty": 1e39, "min_p": 0.1},
        {"temperature": 1.7e308, "top_p": 5e-324},
        {"top_k": 2**31 - 1, "top_p": 1e-300},
    ],
    ids=str,
)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_the_api_accepts_is_sampled_to_the_defined_token(options: dict[str, float], sign: int) -> None:
    parse_params("/v1/completions", {"prompt": "x", **options})
    values = sign * np.abs(np.random.default_rng(0).standard_normal(512)).astype(np.float32) * 3
    asked = SampleInput(Sampling(max_tokens=4, **options), 5, tuple(range(512)), ())  # type: ignore[arg-type]
    (one,) = sample(tensor(values), [asked])
    assert (one.error, one.finite) == (None, True)
    assert one.token_id == choose(values, asked).token_id


def test_a_temperature_below_what_float32_divides_by_is_greedy() -> None:
    values = np.array([1.0, 1.0000001, 1.0], np.float32)
    for temperature in (0.0, 5e-324, 1e-308, 1e-39):
        (one,) = sample(tensor(values), [SampleInput(Sampling(max_tokens=1, temperature=temperature), 1, (), ())])
        assert one.token_id == 1


@pytest.mark.parametrize("options", [{"top_p": 5e-324}, {"min_p": 1.0}, {"top_k": 1}], ids=str)
def test_a_filter_that_leaves_next_to_nothing_leaves_the_likeliest(options: dict[str, float]) -> None:
    values = np.random.default_rng(3).standard_normal(300).astype(np.float32)
    for implementation in IMPLEMENTATIONS.values():
        for seed in range(20):
            asked = SampleInput(Sampling(max_tokens=1, seed=seed, temperature=50.0, **options), 1, (), ())  # type: ignore[arg-type]
            assert implementation(tensor(values), [plan_row(asked, 300)])[0].token_id == values.argmax()


# --- the compiled helper ------------------------------------------------------------------------------------


@needs_helper
def test_the_structures_are_those_of_the_c_source() -> None:
    library = helper.library()
    assert library is not None
    for name, kind in (("disagg_sample_row_nbytes", native._Row), ("disagg_sampled_row_nbytes", native._Sampled)):
        assert ctypes.c_int64.in_dll(library, name).value == ctypes.sizeof(kind)


@needs_helper
@pytest.mark.parametrize("bits", [512, 256, 0])
def test_the_words_of_the_helper_are_those_of_philox(bits: int) -> None:
    """With equal scores the largest word wins."""
    for position, seed in ((0, 0), (2**40 + 3, 2**63 + 1), (7, 2**64 - 1)):
        words = philox.uniforms(
            np.full(1000, philox.as_int64(seed)), np.full(1000, position, np.int64), np.arange(1000)
        )
        asked = SampleInput(Sampling(max_tokens=1, seed=seed), position, (), ())
        with widest(bits):
            assert native.sample(torch.zeros(1, 1000), [plan_row(asked, 1000)])[0].token_id == words.argmax()


@needs_helper
def test_rows_split_over_threads_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 500, generator=torch.Generator().manual_seed(0))
    rows = [plan_row(SampleInput(Sampling(max_tokens=1, seed=i, top_p=0.8), i, (), ()), 500) for i in range(7)]
    alone = native.sample(values, rows)
    monkeypatch.setattr(native, "_cuts", lambda *_: [(0, 2), (2, 3), (3, 7)])
    assert native.sample(values, rows) == alone
    assert native.sample(values.T.contiguous().T, rows) == alone


@needs_helper
def test_cuts_cover_all_rows_once() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for rows, size in ((1, 151_936), (2, 1000), (32, 151_936), (7, 50_000)):
            cuts = native._cuts(rows, size)
            assert [i for first, last in cuts for i in range(first, last)] == list(range(rows))
            assert len(cuts) <= 3
        assert len(native._cuts(32, 151_936)) == 3
        assert len(native._cuts(32, 100)) == 1
    finally:
        torch.set_num_threads(before)


def test_the_words_of_blocks_are_those_of_their_ids() -> None:
    for seed, position in ((0, 0), (2**64 - 5, 2**40), (12345, 2**62)):
        ids = np.arange(400)
        expected = philox.uniforms(np.full(400, philox.as_int64(seed)), np.full(400, position), ids)
        words = philox.block_words(seed, position, np.arange(100)).reshape(-1)
        assert ((words + 0.5) * 2.0**-32 == expected).all()


# --- containment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_helper", [True, False])
def test_a_row_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch, has_helper: bool) -> None:
    monkeypatch.setattr(native, "is_loaded", lambda: has_helper and IMPLEMENTATIONS.keys() > {"plain"})
    values = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    asked = [SampleInput(Sampling(max_tokens=9, seed=i, presence_penalty=1.0), i, (1,), (2, 3)) for i in range(4)]
    expected = sample(values, asked)
    broken = [*asked[:2], SampleInput(asked[2].sampling, 2, (1,), ("x",)), asked[3]]  # type: ignore[arg-type]
    results = sample(values, broken)
    assert results[2].error is not None
    assert [*results[:2], results[3]] == [*expected[:2], expected[3]]


def test_a_row_that_makes_the_whole_call_raise_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    values = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    asked = [SampleInput(Sampling(max_tokens=9, seed=i), i, (), ()) for i in range(4)]
    expected = sample(values, asked)
    draw = plain._draw

    def faulty(adjusted: np.ndarray, row: object) -> int:
        if row.seed == 2:  # type: ignore[attr-defined]
            raise MemoryError("no room")
        return draw(adjusted, row)  # type: ignore[arg-type]

    monkeypatch.setattr(plain, "_draw", faulty)
    results = sample(values, asked)
    assert results[2].error == "MemoryError: no room"
    assert [*results[:2], results[3]] == [*expected[:2], expected[3]]


# --- counts kept from token to token ------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.data())
def test_counts_kept_from_token_to_token_are_those_counted_anew(size: int, data: st.DataObject) -> None:
    ids = st.integers(-1, size)
    prompt, output = data.draw(st.lists(ids, max_size=20)), data.draw(st.lists(ids, max_size=200))
    kept = SeenTokens()
    for length in sorted({*data.draw(st.lists(st.integers(0, len(output)), max_size=4)), len(output)}):
        kept.follow(prompt, output[:length], size)
        known = [i for i in output[:length] if 0 <= i < size]
        assert dict(zip(kept.used.tolist(), kept.counts.tolist(), strict=True)) == {i: known.count(i) for i in known}
        bits = np.unpackbits(kept.bits.view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits).tolist()) == {i for i in (*prompt, *known) if 0 <= i < size}


def test_a_sequence_with_its_counts_gives_the_tokens_of_one_without() -> None:
    sampling = Sampling(max_tokens=99, seed=4, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.1)
    values = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    seen, output = SeenTokens(), []
    for i in range(60):
        without = SampleInput(sampling, i, (1, 2, 3), tuple(output))
        with_counts = SampleInput(sampling, i, (1, 2, 3), output, seen)
        (one,), (other,) = sample(values[i : i + 1], [without]), sample(values[i : i + 1], [with_counts])
        assert one == other
        output.append(one.token_id)


class Watched(tuple[int, ...]):
    """A prompt that counts how often it is read."""

    num_reads = 0

    def __iter__(self):  # type: ignore[no-untyped-def]
        Watched.num_reads += 1
        return super().__iter__()

    def __len__(self) -> int:
        Watched.num_reads += 1
        return super().__len__()


def test_after_the_first_token_a_penalty_does_not_read_the_prompt() -> None:
    sampling, seen, prompt = Sampling(max_tokens=9, repetition_penalty=1.1), SeenTokens(), Watched(range(30))
    sample(torch.zeros(1, 40), [SampleInput(sampling, 30, prompt, [], seen)])
    assert Watched.num_reads > 0
    Watched.num_reads = 0
    for length in range(1, 5):
        sample(torch.zeros(1, 40), [SampleInput(sampling, 30 + length, prompt, [5] * length, seen)])
    assert Watched.num_reads == 0
