"""An answer that moves between two workers has one text and every token once, whatever dies or is lost, and when."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.links.lossy_link import LossyLink
from support.links.moving_world import SINK, SOURCE, MovingWorld

from disagg.router.attempt_events import ClientGone, Fail
from disagg.router.generation import GenerationEnd
from disagg.transceiver.protocol.state import State
from disagg.transceiver.wire.messages.values import Sampling

SAMPLED = Sampling(max_tokens=24, seed=5, temperature=1.0, presence_penalty=0.3)
WORKERS = {"source": SOURCE, "sink": SINK}


def begun(num_tokens: int = 5, **options: object) -> MovingWorld:
    """A world in which the source has answered for a while."""
    world = MovingWorld(SAMPLED, **options)  # type: ignore[arg-type]
    while len(world.token_ids) < num_tokens:
        assert world.progress()
    return world


def finished(world: MovingWorld) -> None:
    world.run_out()
    world.assert_whole()
    assert isinstance(world.ends[0], GenerationEnd)
    assert len(world.token_ids) == SAMPLED.max_tokens


def test_the_sink_goes_on_where_the_source_stood_still() -> None:
    world = begun()
    assert world.move()
    finished(world)
    assert [attempt.mode for attempt in world.request.record.attempts] == ["serve", "move"]
    assert world.request.record.num_moves == 1
    assert world.request.server == SINK


@pytest.mark.parametrize("reuses", [False, True])
def test_an_answer_may_move_to_and_fro_and_blocks_that_stayed_behind_move_no_more(reuses: bool) -> None:
    world = begun(reuses=reuses)
    for _ in range(3):
        assert world.move()
        moves = world.request.record.num_moves
        while world.request.record.num_moves == moves:
            if not world.progress():
                world.pass_time(0.05)
    finished(world)
    assert world.request.record.num_moves == 3
    assert bool(world.num_held) == reuses


def states(world: MovingWorld) -> tuple[State, State]:
    """Of the newest leg at its source and at its sink; WAITING before there is one, CLOSED once it is over."""
    sending, receiving = world.workers[SOURCE].sending, world.workers[SINK].receiving
    source = next(iter(sending.cores.values())).state if sending.cores else State.WAITING
    sink = next(iter(receiving.cores.values())).state if receiving.cores else State.WAITING
    return source, sink


STAGES = {
    "ordered": lambda world: world.request.is_moving,
    "room made": lambda world: states(world)[1] is State.FETCHING,
    "FETCH admitted": lambda world: states(world)[0] is State.PINNING,
    "frozen": lambda world: states(world)[0] is State.SENDING,
    "ACCEPTED heard": lambda world: states(world)[1] is State.EXTENDING,
    "room extended": lambda world: states(world)[1] is State.LANDING,
    "DONE said": lambda world: states(world)[0] is State.DECIDED,
    "verified": lambda world: states(world)[1] is State.VERIFIED,
    "acknowledged": lambda world: states(world)[0] is State.CLOSED or not world.workers[SOURCE].sending.cores,
    "sink spoke": lambda world: world.request.server == SINK,
}
"""What is true for the first time at each step of a move."""


def at(stage: str) -> MovingWorld:
    """A world whose move has just come so far."""
    world = begun()
    assert world.move()
    reached = False
    for _ in range(2000):
        if reached := STAGES[stage](world):
            break
        if not one_thing(world):
            world.pass_time(0.01)
        if stage == "acknowledged" and states(world)[1] is not State.VERIFIED:
            continue
    assert reached, stage
    return world


def one_thing(world: MovingWorld) -> bool:
    """The first thing that can happen without time, and no other."""
    if world.deliver():
        return True
    for worker in world.alive:
        if worker.take_order() or worker.take_event() or worker.receiving.land_one() or world.hear(worker):
            return True
    for worker in world.alive:
        if worker.engine.has_work:
            worker.step()
            return True
    return False


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dies", WORKERS)
def test_whoever_dies_at_whatever_step_the_answer_goes_on_whole(stage: str, dies: str) -> None:
    world = at(stage)
    world.kill(WORKERS[dies])
    finished(world)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dies", WORKERS)
def test_a_death_that_the_router_hears_of_at_once_does_no_more(stage: str, dies: str) -> None:
    world = at(stage)
    world.kill(WORKERS[dies])
    world.find_out(WORKERS[dies])
    finished(world)


@pytest.mark.parametrize("stage", STAGES)
def test_a_link_that_is_cut_at_whatever_step_leaves_one_owner(stage: str) -> None:
    world = at(stage)
    world.cut()
    finished(world)


@pytest.mark.parametrize("stage", STAGES)
def test_a_client_that_leaves_at_whatever_step_leaves_nothing_behind(stage: str) -> None:
    world = at(stage)
    world.handle(ClientGone())
    world.run_out()
    for worker in world.alive:
        worker.assert_empty()
    world.assert_one_text()


@pytest.mark.parametrize("stage", STAGES)
def test_without_continuations_a_death_ends_the_answer_or_changes_nothing(stage: str) -> None:
    world = at(stage)
    world.request._going_on.most = 0
    world.kill(SOURCE)
    world.run_out()
    world.assert_whole()
    if isinstance(world.ends[0], Fail):
        assert world.ends[0].status == 502


def test_a_sink_without_room_leaves_the_answer_where_it_is() -> None:
    world = begun(sink_slots=(3, 4))
    assert world.move()
    finished(world)
    modes = [attempt.mode for attempt in world.request.record.attempts]
    assert modes == ["serve", "move", "resume"]
    assert world.request.server == SOURCE


def test_a_source_never_goes_on_by_itself() -> None:
    """Frozen, and every word about it lost: it stands still until the router has closed the sink's epoch."""
    world = at("frozen")
    world.cut()
    source = world.workers[SOURCE]
    seen = len(source.engine.tokens(next(iter(source.engine.events_of))))
    source.words.clear()
    world.lose_link(source)
    for _ in range(50):
        source.step()
        source.take_event()
    assert len(source.engine.tokens(next(iter(source.engine.events_of)))) == seen
    assert not source.decodes


def test_two_workers_that_both_go_on_are_seen_by_this_world() -> None:
    """Control: a source that thaws without the router's word, and a router that believes both, give two texts."""
    from disagg.engine.commands import Thaw

    world = at("verified")
    source = world.workers[SOURCE]
    (key,) = source.engine.stats().live_keys
    source.submit(Thaw(key))
    for _ in range(3):
        source.step()
    while source.take_event():
        pass
    while world.hear(source):
        pass
    world.run_out()
    with pytest.raises(AssertionError, match="follows another text"):
        world.assert_one_text()


AMPLE = (60, 120)

ACTIONS = st.sampled_from(
    ["deliver"] * 6
    + ["order source", "order sink", "event source", "event sink", "land", "hear source", "hear sink"] * 3
    + ["step source", "step sink"] * 2
    + ["move", "move", "time", "time", "long time"]
)
FATES = st.sampled_from(["nothing", "nothing", "kill source", "kill sink", "cut", "lose at source", "lose at sink"])


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(ACTIONS, min_size=20, max_size=120),
    fate=FATES,
    when=st.integers(0, 120),
    seed=st.integers(0, 2**32),
    rough=st.booleans(),
    finds_out=st.booleans(),
    room=st.sampled_from([AMPLE, AMPLE, (6, 14)]),
    reuses=st.booleans(),
)
def test_any_schedule_of_a_move_gives_one_text_and_leaks_nothing(
    steps: list[str],
    fate: str,
    when: int,
    seed: int,
    rough: bool,
    finds_out: bool,
    room: tuple[int, int],
    reuses: bool,
) -> None:
    link = LossyLink(seed, 0.2, 0.2, 0.05, 0.3) if rough else LossyLink(seed)
    world = begun(3, link=link, sink_slots=room, reuses=reuses)
    world.move()
    for number, step in enumerate(steps):
        if number == when:
            befall(world, fate, finds_out)
        play(world, step)
    if when >= len(steps):
        befall(world, fate, finds_out)
    if fate == "kill source" and room != AMPLE:  # then no worker is left that could ever hold it all
        world.run_out()
        world.assert_whole()
    else:
        finished(world)


def befall(world: MovingWorld, fate: str, finds_out: bool) -> None:
    match fate.split():
        case ["kill", name]:
            world.kill(WORKERS[name])
            if finds_out:
                world.find_out(WORKERS[name])
        case ["cut"]:
            world.cut()
        case ["lose", "at", name]:
            world.lose_link(world.workers[WORKERS[name]])


def play(world: MovingWorld, step: str) -> None:
    kind, _, name = step.partition(" ")
    worker = world.workers[WORKERS.get(name, SINK)]
    if not worker.is_alive:
        return
    match kind:
        case "deliver":
            world.deliver()
        case "order":
            worker.take_order()
        case "event":
            worker.take_event()
        case "land":
            worker.receiving.land_one()
        case "hear":
            world.hear(worker)
        case "step":
            worker.step()
        case "move":
            world.move()
        case "time":
            world.pass_time(0.1)
        case "long":
            world.pass_time(2.0)
