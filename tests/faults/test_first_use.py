"""Where links are made on use: the first request makes its own, and what goes wrong meanwhile costs an attempt."""

from __future__ import annotations

from typing import Any

import pytest
from support.event_loop import until
from support.links.shell_pair import ShellTrio

from disagg.router.router import RouterOptions


class LazyTrio(ShellTrio):
    options = RouterOptions(connect="lazy")

    def _is_whole(self) -> bool:
        if not all(hasattr(worker, "registration") for worker in self.workers):
            return False
        incarnations = {worker.registration.node.incarnation for worker in self.workers}
        return (
            {worker.incarnation for worker in self.router.cluster.registry} == incarnations
            and hasattr(self.decode.registration, "_attempts")
            and self.router.is_ready()
        )

    @property
    def peers(self) -> list[str]:
        """Those the decode worker has links to."""
        return [link.target.incarnation for link in self.decode.receiving.links]


@pytest.fixture
def trio_kind() -> type[ShellTrio]:
    return LazyTrio


pytestmark = pytest.mark.parametrize(("plane", "scale"), [("shm", 0.2)])


def test_the_first_request_makes_the_link_and_the_next_uses_it(arena: Any) -> None:
    async def story(trio: LazyTrio) -> None:
        assert trio.peers == []
        for _ in range(2):
            reply = await trio.ask()
            assert (reply.kind, reply.num_attempts) == ("answer", 1)
            assert trio.peers == [trio.prefill.registration.node.incarnation]
        await trio.settle()

    arena.run(story)


def test_a_peer_that_cannot_be_reached_costs_the_attempt_and_no_answer(arena: Any) -> None:
    async def story(trio: LazyTrio) -> None:
        trio.links.control.cut(down=True)
        reply = await trio.ask()
        assert (reply.kind, reply.num_attempts) == ("answer", 2), "computed by the decode worker itself"
        await trio.settle()
        trio.links.control.is_down = False
        (link,) = trio.decode.receiving.links
        await until(lambda: link.is_ready, "the link is tried again")

    arena.run(story)
    arena.end_trio()


def test_a_client_that_leaves_while_the_link_is_made_leaves_nothing_behind(arena: Any) -> None:
    async def story(trio: LazyTrio) -> None:
        trio.links.control.cut(down=True)
        client = trio.begin()
        await until(lambda: trio.peers, "the link is being made")
        await until(lambda: trio.decode.engine.num_used, "destinations are reserved")
        client.cancel()
        await trio.settle()
        assert not trio.decode.receiving.held

    arena.run(story)
    arena.end_trio()


def test_the_link_to_a_peer_that_died_goes_and_its_successor_gets_one_on_use(arena: Any) -> None:
    async def story(trio: LazyTrio) -> None:
        await trio.ask()
        await trio.prefill.kill()
        trio.start_worker("prefill")
        await trio.ready()
        reply = await trio.ask()
        assert reply.kind == "answer"
        await until(lambda: trio.peers == [trio.prefill.registration.node.incarnation], "the dead peer's link is gone")
        await trio.settle()

    arena.run(story)
    arena.end_trio()
