"""Which way a request takes: every legal way is found, costs what the formula says, and the cheapest one is chosen."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.router.costs.decide import POLICIES, TIE, decide
from disagg.router.costs.kv_shape import GroupShape, KvShape
from disagg.router.costs.rates import LinkRate, Links, Rates
from disagg.router.costs.ways import MAX_PUT_OFF, Ask, Candidate, Way, legal_ways
from disagg.transceiver.layout.required import moved_nbytes, needed_units, required_units
from disagg.transceiver.wire.messages.values import GroupSemantics

KV = KvShape(16, (GroupShape(None, 0, 1000), GroupShape(64, 0, 500)))
RATES = Rates(1000.0, ((1, 0.01), (4, 0.02)))
AWARE = POLICIES["prefix-aware"]


def worker(name: str, role: str, **fields: object) -> Candidate:
    given_fields = {"kv": KV, "rates": RATES} | fields
    return Candidate(name, role, **given_fields)  # type: ignore[arg-type]


def linked(*pairs: tuple[str, str], rate: LinkRate | None = None) -> Links:
    link = rate or LinkRate(1.0, 0.001)
    return lambda source, sink: link if (source, sink) in pairs else None


def everywhere(source: str, sink: str) -> LinkRate | None:
    return LinkRate(1.0, 0.001)


def told(way: Way | None) -> tuple[str, str, str | None, int]:
    assert way is not None
    return way.start.worker.name, way.landing.worker.name, way.start.source, way.start.num_computed


# --- bytes ------------------------------------------------------------------------------------------------------

windows = st.one_of(st.none(), st.integers(1, 80))


@settings(max_examples=300, deadline=None)
@given(
    groups=st.lists(st.tuples(windows, st.integers(0, 40)), min_size=1, max_size=3),
    block_size=st.sampled_from([1, 4, 16]),
    num_tokens=st.integers(1, 300),
    held_blocks=st.integers(0, 40),
)
def test_moved_bytes_are_those_of_the_ordinals_that_a_transfer_would_move(
    groups: list[tuple[int | None, int]], block_size: int, num_tokens: int, held_blocks: int
) -> None:
    shape = KvShape(block_size, tuple(GroupShape(window, sinks, 10 + n) for n, (window, sinks) in enumerate(groups)))
    semantics = [GroupSemantics(window, sinks, 1, 1, (n,)) for n, (window, sinks) in enumerate(groups)]
    boundary = shape.usable(num_tokens, held_blocks * block_size)
    held = [set(entry.ordinals) for entry in needed_units(semantics, boundary, block_size)] if boundary else ()
    required = required_units(semantics, num_tokens, block_size, held)
    assert shape.moved_nbytes(num_tokens, boundary) == moved_nbytes(required, [10 + n for n in range(len(groups))])


def test_a_prompt_is_never_continued_behind_its_last_token() -> None:
    assert [KV.usable(33, held) for held in (0, 15, 16, 32, 33, 48)] == [0, 0, 16, 32, 32, 32]
    assert KV.usable(32, 32) == 16


# --- rates ------------------------------------------------------------------------------------------------------


def test_steps_between_two_that_were_measured_lie_on_a_line_and_beyond_the_last_in_proportion() -> None:
    rates = Rates(1.0, ((1, 1.0), (3, 2.0), (4, 4.0)))
    assert [rates.step_seconds(n) for n in (1, 2, 3, 4, 8)] == [1.0, 1.5, 2.0, 4.0, 8.0]
    assert rates.answer_seconds(0) == 1.0
    assert rates.answer_seconds(3) == 4.0 + 3 * (4.0 - 2.0)


def test_a_larger_step_that_was_measured_faster_makes_no_answer_a_gain() -> None:
    rates = Rates(1000.0, ((1, 0.01), (4, 0.06), (8, 0.02)))
    assert rates.answer_seconds(4) == rates.step_seconds(5) > 0
    shape = KvShape(16, (GroupShape(None, 0, 64),))
    busy = [Candidate(name, "both", shape, rates, num_answers=4) for name in "ab"]
    assert decide(Ask(10, 50, 50.0), busy, lambda source, sink: None, POLICIES["prefix-aware"]) is not None


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_no_rate_cannot_be_built(value: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        Rates(value, ((1, 1.0),))
    with pytest.raises(ValueError, match="expected"):
        Rates(1.0, ((1, value),))
    with pytest.raises(ValueError, match="expected"):
        LinkRate(value)
    with pytest.raises(ValueError, match="expected"):
        worker("p", "prefill", queue_s=value - 1)


def test_batches_that_do_not_ascend_cannot_be_built() -> None:
    for points in ((), ((0, 1.0),), ((2, 1.0), (2, 1.0)), ((3, 1.0), (2, 1.0))):
        with pytest.raises(ValueError, match="ascending"):
            Rates(1.0, points)


# --- ways and choices -------------------------------------------------------------------------------------------


def test_the_estimate_is_the_sum_of_queue_fetch_computing_and_handoff() -> None:
    busy = worker("p", "prefill", queue_s=0.5)
    idle = worker("d", "decode")
    ask = Ask(1600, 8, held={"x": 800})
    links = linked(("p", "d"), ("x", "p"), rate=LinkRate(0.001, 0.01))
    own, fetched = legal_ways(ask, [busy, idle], links)
    assert (own.start.num_computed, fetched.start.num_computed) == (1600, 800)
    handoff_s = 0.01 + KV.moved_nbytes(1600, 0) / 1e6
    fetch_s = 0.01 + KV.moved_nbytes(800, 0) / 1e6
    assert own.ttft_s == pytest.approx(0.5 + 1.6 + handoff_s)
    assert fetched.ttft_s == pytest.approx(0.5 + fetch_s + 0.8 + handoff_s)


def test_room_is_waited_for_while_the_prompt_is_computed() -> None:
    full = worker("d", "decode", room_s=5.0)
    (way,) = legal_ways(Ask(1000, 8), [worker("p", "prefill"), full], linked(("p", "d")))
    assert way.ttft_s == pytest.approx(5.0 + way.landing.handoff_s)


def test_short_prompts_of_an_idle_pair_are_computed_where_they_are_decoded_and_long_ones_are_not() -> None:
    idle = [worker("p", "prefill"), worker("d", "decode")]
    short, long = Ask(200, 8, max_local_prefill=256), Ask(800, 8, max_local_prefill=256)
    assert told(decide(short, idle, everywhere, AWARE)) == ("d", "d", None, 200)
    assert told(decide(long, idle, everywhere, AWARE)) == ("p", "d", None, 800)
    never = replace(short, max_local_prefill=0)
    assert told(decide(never, idle, everywhere, AWARE)) == ("p", "d", None, 200)


def test_a_short_prompt_leaves_answers_in_peace_when_there_are_many() -> None:
    pair = [worker("p", "prefill"), worker("d", "decode", num_answers=4)]
    slow = linked(("p", "d"), rate=LinkRate(1.0, 0.1))
    assert told(decide(Ask(20, 8, max_local_prefill=256), pair, slow, AWARE))[0] == "d", "80 ms of others, 100 of links"
    assert told(decide(Ask(40, 8, max_local_prefill=256), pair, slow, AWARE))[0] == "p", "160 ms of others"


def test_what_is_cached_where_it_is_decoded_counts_as_short() -> None:
    pair = [worker("p", "prefill"), worker("d", "decode")]
    ask = Ask(1000, 8, held={"d": 960}, max_local_prefill=256)
    assert told(decide(ask, pair, everywhere, AWARE)) == ("d", "d", None, 40)


def test_turn_two_computes_only_what_is_new_when_another_worker_holds_the_rest() -> None:
    fleet = [worker("p0", "prefill"), worker("p1", "prefill"), worker("d0", "decode"), worker("d1", "decode")]
    ask = Ask(2000, 8, held={"d0": 1600})
    only_p0 = linked(("d0", "p0"), ("p0", "d1"), ("p1", "d1"))
    assert told(decide(ask, fleet, only_p0, AWARE)) == ("p0", "d1", "d0", 400)


def test_a_link_that_fetches_no_prefixes_only_hands_over() -> None:
    ask, pair = Ask(2000, 8, held={"d": 1600}), [worker("p", "prefill"), worker("d", "decode")]
    plain = linked(("p", "d"), ("d", "p"), rate=LinkRate(1.0, fetches=False))
    assert told(decide(ask, pair, plain, AWARE)) == ("p", "d", None, 2000)


def test_a_link_that_hands_nothing_over_makes_no_pair() -> None:
    ask, pair = Ask(2000, 8, held={"p": 1600}), [worker("p", "prefill"), worker("d", "decode")]
    only_fetches = linked(("p", "d"), rate=LinkRate(1.0, hands_over=False))
    assert decide(ask, pair, only_fetches, AWARE) is None
    lifted = replace(ask, max_local_prefill=400)
    assert told(decide(lifted, pair, only_fetches, AWARE)) == ("d", "d", "p", 400)


def test_a_fetch_that_would_be_given_up_is_no_way() -> None:
    pair = [worker("p", "prefill"), worker("d", "decode")]
    ask = Ask(1000, 8, held={"d": 960})
    nbytes = KV.moved_nbytes(960, 0)
    for seconds, expected in ((0.24, "d"), (0.26, None)):
        links = linked(("d", "p"), ("p", "d"), rate=LinkRate(nbytes / seconds / 1e9))
        assert told(decide(ask, pair, links, AWARE))[2] == expected, f"{MAX_PUT_OFF} of a second is the most"


def test_both_workers_shift_from_serving_alone_to_pairs_request_by_request() -> None:
    ask = Ask(800, 40, expected_tokens=40, max_local_prefill=256)
    idle = [worker("b0", "both"), worker("b1", "both")]
    assert told(decide(ask, idle, everywhere, AWARE))[:2] == ("b0", "b0")
    decoding = [worker("b0", "both", num_answers=4), worker("b1", "both", queue_s=0.1)]
    slow_step = Rates(1000.0, ((1, 0.01), (8, 0.011)))
    decoding = [replace(one, rates=slow_step) for one in decoding]
    assert told(decide(ask, decoding, everywhere, AWARE))[:2] == ("b1", "b1")
    other_busy = [replace(decoding[0], room_s=0.0), replace(decoding[1], room_s=3.0)]
    assert told(decide(ask, other_busy, everywhere, AWARE))[:2] == ("b1", "b0"), "computed by one, decoded by the other"


def test_both_workers_that_all_decode_still_take_a_long_prompt() -> None:
    busy = [worker("b0", "both", num_answers=4), worker("b1", "both", num_answers=2)]
    assert told(decide(Ask(800, 8), busy, linked(), AWARE))[:2] == ("b1", "b1")


def test_a_decode_worker_without_links_takes_no_long_prompt() -> None:
    fleet = [worker("p", "prefill"), worker("d", "decode")]
    assert decide(Ask(800, 8, max_local_prefill=256), fleet, linked(), AWARE) is None
    assert told(decide(Ask(200, 8, max_local_prefill=256), fleet, linked(), AWARE))[:2] == ("d", "d")


def test_one_token_is_computed_by_a_worker_that_computes_prompts() -> None:
    fleet = [worker("d", "decode"), worker("p", "prefill", queue_s=9.0)]
    for policy in POLICIES.values():
        assert told(decide(Ask(100, 1, max_local_prefill=512), fleet, everywhere, policy))[:2] == ("p", "p")


def test_ties_are_taken_in_turn_under_every_policy() -> None:
    fleet = [worker(name, role) for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"))]
    fleet.append(worker("d1", "decode", rates=Rates(1000.0, ((1, 0.0101), (4, 0.0202)))))
    for policy in POLICIES.values():
        used = Counter(told(decide(Ask(800, 8), fleet, everywhere, policy, turn))[:2] for turn in range(8))
        assert used == {(p, d): 2 for p in ("p0", "p1") for d in ("d0", "d1")}, policy.name


def test_the_other_presets_use_the_own_prefix_alone_and_pairs_before_all_else() -> None:
    fleet = [worker("b", "both"), worker("p0", "prefill", num_requests=3), worker("p1", "prefill", num_requests=1)]
    fleet += [worker("d", "decode", num_answers=7, num_requests=9)]
    ask = Ask(800, 8, held={"d": 640, "p0": 160}, max_local_prefill=512)
    assert told(decide(ask, fleet, everywhere, POLICIES["least-loaded"])) == ("p1", "d", None, 800)
    used = {told(decide(ask, fleet, everywhere, POLICIES["round-robin"], turn))[0] for turn in range(2)}
    assert used == {"p0", "p1"}
    assert told(decide(ask, fleet[:1], everywhere, POLICIES["round-robin"])) == ("b", "b", None, 800)


names = st.sampled_from([("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode"), ("b0", "both")])
seconds = st.sampled_from([0.0, 0.1, 1.0])


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    chosen = draw(st.lists(names, unique=True, max_size=5))
    return [
        worker(
            name,
            role,
            rates=Rates(draw(st.sampled_from([500.0, 1000.0])), ((1, 0.01), (4, draw(st.sampled_from([0.01, 0.05]))))),
            queue_s=draw(seconds),
            room_s=draw(seconds),
            num_answers=draw(st.integers(0, 6)),
            num_requests=draw(st.integers(0, 6)),
        )
        for name, role in chosen
    ]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), fleet=candidates(), num_tokens=st.integers(1, 900), max_tokens=st.sampled_from([1, 50]))
def test_the_choice_costs_no_more_than_any_way_that_a_plain_search_finds(
    data: st.DataObject, fleet: list[Candidate], num_tokens: int, max_tokens: int
) -> None:
    speeds = {
        (a, b): data.draw(
            st.sampled_from(
                [None, LinkRate(0.0005, 0.02), LinkRate(1.0, fetches=False), LinkRate(1.0, hands_over=False)]
            )
        )
        for a in ("x", *(c.name for c in fleet))
        for b in (c.name for c in fleet)
        if a != b
    }
    held = {name: data.draw(st.integers(0, 60)) * 16 for name in ("x", *(c.name for c in fleet))}
    bound = data.draw(st.sampled_from([0, 100, 1000]))
    expected = float(min(max_tokens, 20))
    ask = Ask(num_tokens, max_tokens, expected, held, bound)
    found = plain_search(ask, fleet, speeds)
    way = decide(ask, fleet, lambda a, b: speeds.get((a, b)), AWARE, data.draw(st.integers(0, 9)))
    if way is None:
        assert not found
        return
    assert found
    key = (way.start.worker.name, way.landing.worker.name, way.start.source)
    assert found[key] == pytest.approx(way.cost_s)
    assert way.cost_s <= min(found.values()) * TIE + 1e-9


def plain_search(
    ask: Ask, fleet: list[Candidate], speeds: dict[tuple[str, str], LinkRate | None]
) -> dict[tuple[str, str, str | None], float]:
    """Every way by nested loops, the formula written out; the bound is lifted for `both` workers as a last resort."""
    for is_lifted in (False, True):
        found: dict[tuple[str, str, str | None], float] = {}
        for a in fleet:
            for b in fleet:
                for source in (None, *ask.held):
                    if (cost := plain_cost(ask, a, b, source, speeds, is_lifted=is_lifted)) is not None:
                        found[a.name, b.name, source] = cost
        if found:
            return found
    return {}


def plain_cost(
    ask: Ask,
    a: Candidate,
    b: Candidate,
    source: str | None,
    speeds: dict[tuple[str, str], LinkRate | None],
    *,
    is_lifted: bool,
) -> float | None:
    last = (ask.num_tokens - 1) // 16 * 16
    own = min(ask.held[a.name], last)
    rate = a.rates.prefill_tokens_per_s
    begin, fetch_s = own, 0.0
    if source is not None:
        link, begin = speeds.get((source, a.name)), min(ask.held[source], last)
        if source == a.name or link is None or not link.fetches or begin <= own:
            return None
        fetch_s = link.latency_s + KV.moved_nbytes(begin, own) / link.gb_per_s / 1e9
        if fetch_s > (ask.num_tokens - own) / rate / 4:
            return None
    to_compute = ask.num_tokens - begin
    handoff_s = 0.0
    if a is b:
        if ask.max_tokens == 1 and a.role == "decode":
            return None
        others_decode = a.role == "decode" or (a.num_answers > 0 and not is_lifted)
        if ask.max_tokens > 1 and (a.role == "prefill" or (others_decode and to_compute > ask.max_local_prefill)):
            return None
    else:
        link = speeds[a.name, b.name]
        if (
            ask.max_tokens == 1
            or link is None
            or not link.hands_over
            or a.role == "decode"
            or b.role == "prefill"
            or is_lifted
        ):
            return None
        nbytes = KV.moved_nbytes(ask.num_tokens, min(ask.held[b.name], last))
        handoff_s = link.latency_s + nbytes / link.gb_per_s / 1e9
    n = b.num_answers
    step, more = (b.rates.step_seconds(n) if n else 0.0), b.rates.step_seconds(n + 1)
    decoding = (ask.expected_tokens - 1) * ((n + 1) * more - n * step)
    compute_s = to_compute / rate
    return max(a.queue_s + fetch_s + compute_s, b.room_s) + handoff_s + a.num_answers * compute_s + decoding
