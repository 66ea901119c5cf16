"""Prefill with scratch slots gives the blocks and tokens of prefill without, and leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.model.engine_pair import LAYOUT, TestedEngine, greedy, key, prompt_of, transfer
from support.model.fake_runner import reference_tokens
from support.oracles.cache_oracle import needed_blocks

from disagg.cache.admission import peak_slots
from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout, LayerSpec, derive_layout
from disagg.engine.commands import Decode, DropSoft, Pin, Prefill, Release, Reserve, Serve

torch.set_num_threads(1)


def wide_layout() -> CacheLayout:
    """Windowed groups of four, two and one layers that share a pool with each other and a full one."""
    shapes = [(9, 1, 4), (6, 2, 2), (None, 4, 1), (12, 4, 1)]
    layers: list[LayerSpec] = []
    for window, heads, count in shapes:
        layers += [LayerSpec(len(layers) + i, window, 0, heads, 2, "float32", len(layers) + i) for i in range(count)]
    return derive_layout(layers, block_size=4, max_model_len=200)


WIDE = wide_layout()
LAYOUTS = {"sinks and two pools": (LAYOUT, (60, 120)), "one pool for all": (WIDE, (200,))}


@pytest.fixture(params=list(LAYOUTS))
def room(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    layout, num_slots = LAYOUTS[request.param]
    return {"layout": layout, "num_slots": num_slots}


@pytest.mark.parametrize("mode", ["on", "reuse"])
@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    batched_tokens=st.integers(4, 80),
    name=st.sampled_from(list(LAYOUTS)),
)
def test_tokens_after_a_transfer_are_those_without_blocks(
    mode: str, lengths: list[int], batched_tokens: int, name: str
) -> None:
    layout, num_slots = LAYOUTS[name]
    limits = {"layout": layout, "num_slots": num_slots, "max_num_seqs": 4, "max_num_batched_tokens": batched_tokens}
    source, target = TestedEngine(role="prefill", swa_scratch=mode, **limits), TestedEngine(role="decode", **limits)
    for number, length in enumerate(lengths):
        target.handle(Reserve(key(number), prompt_of(length, number), greedy(6)))
        source.handle(Prefill(key(number), prompt_of(length, number), greedy(6)))
        source.handle(Pin(key(number)))
    source.run()
    assert source.cache.num_scratch == (0,) * layout.num_pools
    for number, length in enumerate(lengths):
        verified = transfer(source, target, key(number), length)  # it fails for a unit too few or too many
        source.handle(Release(key(number)))
        target.handle(Decode(key(number), verified))
    target.run()
    for number, length in enumerate(lengths):
        assert target.tokens(key(number)) == reference_tokens(layout, prompt_of(length, number), greedy(6))
    assert source.num_used == target.num_used == 0


def test_a_prefill_worker_that_serves_answers_as_without_scratch(room: dict[str, object]) -> None:
    engine = TestedEngine(role="prefill", swa_scratch="on", max_num_batched_tokens=23, **room)
    engine.serve_all([Serve(key(n), prompt_of(50 + n, n), greedy(9)) for n in range(3)])
    for n in range(3):
        assert engine.tokens(key(n)) == reference_tokens(room["layout"], prompt_of(50 + n, n), greedy(9))


def test_a_prompt_in_one_step_takes_few_slots() -> None:
    peaks = {}
    for mode in ("off", "on"):
        engine = TestedEngine(
            role="prefill", layout=WIDE, num_slots=(200,), max_num_batched_tokens=80, swa_scratch=mode
        )
        engine.handle(Prefill(key(1), prompt_of(80), greedy(2)))
        engine.run()
        peaks[mode] = engine.stats().pools[0].peak_used
    # 20 blocks; live at the end: 2 + 1 + 20 + 3, of windows 9, 6, full and 12; scratch: 18 / 4, 19 / 2 and 17 / 1
    assert peaks == {"off": 80, "on": 2 + 1 + 20 + 3 + 5 + 10 + 17}


@pytest.mark.parametrize("mode", ["on", "reuse"])
@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 60), batched_tokens=st.integers(1, 60), name=st.sampled_from(list(LAYOUTS)))
@example(length=30, batched_tokens=15, name="sinks and two pools")
def test_a_pool_of_just_what_is_promised_computes_the_prompt(
    mode: str, length: int, batched_tokens: int, name: str
) -> None:
    layout = replace(LAYOUTS[name][0], uses_scratch=True)
    peaks = peak_slots(layout, total_tokens=length, history=0, step_tokens=min(length, batched_tokens))
    engine = TestedEngine(
        role="prefill",
        layout=layout,
        num_slots=[peak + 2 for peak in peaks],
        max_num_seqs=1,
        max_num_batched_tokens=batched_tokens,
        swa_scratch=mode,
    )
    engine.serve_all([Prefill(key(1), prompt_of(length), greedy(2))])
    assert engine.computed(key(1)) is not None


def test_a_step_that_holds_more_than_was_promised_is_noticed() -> None:
    """Negative control: the 58 slots of the test above, 32 of them scratch, which nobody holds between steps."""
    engine = TestedEngine(role="prefill", layout=WIDE, num_slots=(200,), max_num_batched_tokens=80, swa_scratch="on")
    engine.handle(Prefill(key(1), prompt_of(80), greedy(2)))
    engine._scheduler._promises.shrink(key(1), (57,))
    with pytest.raises(AssertionError, match=r"58,.*> .*57,"):
        engine.step()


@pytest.mark.parametrize("seed", range(6))
def test_cancels_and_drops_between_steps_leave_nothing(seed: int, room: dict[str, object]) -> None:
    draw = random.Random(seed)
    engine = TestedEngine(role="prefill", swa_scratch="on", max_num_batched_tokens=draw.randint(5, 40), **room)
    for number in range(12):
        engine.handle(Prefill(key(number), prompt_of(draw.randint(1, 70), number), greedy(2)))
    while engine.has_work:
        number = draw.randrange(12)
        engine.handle(draw.choice([Release, DropSoft, Pin])(key(number)))
        engine.step()
        assert engine.cache.num_scratch == (0,) * len(engine.cache.pools)
    for number in range(12):
        engine.handle(Release(key(number)))
    assert engine.num_used == 0


def test_a_step_that_is_aborted_leaks_no_scratch(room: dict[str, object]) -> None:
    """Between `schedule` and the commit: the runner raises, and whoever cleans up releases the sequence."""
    engine = TestedEngine(role="prefill", swa_scratch="on", max_num_batched_tokens=64, **room)

    def broken(chunks: object) -> torch.Tensor:
        raise RuntimeError("no step")

    engine.runner.execute = broken  # type: ignore[method-assign]
    engine.handle(Prefill(key(1), prompt_of(64), greedy(2)))
    with pytest.raises(RuntimeError):
        engine.step()
    assert sum(engine.cache.num_scratch) > 0
    engine.cache.check_invariants()
    engine.handle(Release(key(1)))
    assert (engine.num_used, sum(engine.cache.num_scratch)) == (0, 0)


def test_non_finite_logits_in_a_step_with_scratch_leave_no_nan_behind() -> None:
    engine = TestedEngine(role="prefill", swa_scratch="on", max_num_batched_tokens=64, poison=39)
    prompt = tuple(token % 39 for token in prompt_of(60))
    engine.handle(Prefill(key(1), (*prompt[:10], 39, *prompt[10:]), greedy(2)))
    engine.run()
    assert engine.num_used == 0
    engine.serve_all([Serve(key(2), prompt, greedy(4))])
    assert engine.tokens(key(2)) == reference_tokens(LAYOUT, prompt, greedy(4))


# --- reuse ----------------------------------------------------------------------------------------------------


def cached_tokens(mode: str, length: int, batched_tokens: int) -> int:
    """How much of a prompt, asked a second time, a prefill worker finds in its cache."""
    hasher = BlockHasher(b"k" * 32, "model")
    engine = TestedEngine(
        role="prefill",
        layout=WIDE,
        num_slots=(400,),
        max_num_batched_tokens=batched_tokens,
        swa_scratch=mode,
        hasher=hasher,
    )
    for epoch in (1, 2):
        engine.handle(Prefill(key(1, epoch), prompt_of(length), greedy(2)))
        engine.run()
        engine.handle(Release(key(1, epoch)))
    first, second = (engine.computed(key(1, epoch)) for epoch in (1, 2))
    assert first is not None
    assert second is not None
    assert first.first_token.token_id == second.first_token.token_id
    assert engine.stats().prompt_tokens_computed == 2 * length - second.first_token.num_cached_tokens
    return second.first_token.num_cached_tokens


@pytest.mark.parametrize("length", [61, 62, 63, 64, 65])
@pytest.mark.parametrize("batched_tokens", [100, 62, 17])
def test_reuse_matches_the_same_prompt_as_far_as_without_scratch(length: int, batched_tokens: int) -> None:
    assert cached_tokens("reuse", length, batched_tokens) == (length - 1) // 4 * 4
    assert cached_tokens("off", length, batched_tokens) == (length - 1) // 4 * 4


def test_without_reuse_a_block_that_the_match_needs_may_be_gone() -> None:
    """Negative control: at 64 tokens the match ends at 60, whose window begins a block before that of 64."""
    assert cached_tokens("on", 64, 100) == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(8, 100))
def test_reuse_keeps_at_most_one_block_per_group_more_in_the_last_chunk(length: int, batched_tokens: int) -> None:
    kept = {}
    for mode in ("on", "reuse"):
        engine = TestedEngine(
            role="prefill",
            layout=WIDE,
            num_slots=(200,),
            max_num_batched_tokens=batched_tokens,
            swa_scratch=mode,
        )
        engine.handle(Prefill(key(1), prompt_of(length), greedy(2)))
        tables: list[tuple[int, ...]] = []
        execute = engine.runner.execute

        def spy(chunks, tables=tables, execute=execute):  # type: ignore[no-untyped-def]
            tables.append(tuple(int((table >= 0).sum()) for table in chunks[0].tables))
            return execute(chunks)

        engine.runner.execute = spy  # type: ignore[method-assign]
        engine.run()
        kept[mode] = tables[-1]
    assert all(0 <= more - less <= 1 for more, less in zip(kept["reuse"], kept["on"], strict=True))


def test_nothing_announced_ever_lay_in_a_scratch_slot() -> None:
    """By ordinal: what is announced is what the receiver needs, and a scratch block is stale by then."""
    engine = TestedEngine(role="prefill", swa_scratch="on", max_num_batched_tokens=31)
    scratch: set[tuple[int, int]] = set()
    execute = engine.runner.execute

    def spy(chunks):  # type: ignore[no-untyped-def]
        for number, part in enumerate(chunks[0].scratch):
            if part is not None:
                scratch.update((number, part.first + block) for block in range(part.num_blocks))
        return execute(chunks)

    engine.runner.execute = spy  # type: ignore[method-assign]
    engine.handle(Prefill(key(1), prompt_of(64), greedy(2)))
    engine.run()
    announced = {(unit.group, unit.ordinal) for unit in engine.final_units(key(1), 0)}
    assert scratch
    assert not announced & scratch
    for number, group in enumerate(LAYOUT.groups):
        expected = needed_blocks(64, group.window, group.num_sink_tokens, 4)
        assert sorted(o for g, o in announced if g == number) == expected


def test_a_cache_without_scratch_in_its_layout_never_uses_any() -> None:
    cache = KVCache(WIDE, (200,))
    sequence = cache.open("a")
    assert cache.resize(sequence, capacity=100, history=0, scratch_until=100)
    assert cache.num_scratch == (0,)
    cache.close()
