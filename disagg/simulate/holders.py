"""Which workers hold a block, as they tell of what they register and drop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from disagg.simulate.worker import SimulatedWorker


class Holders:
    """By block of the trace, of the layer group that keeps most: the one with the longest window, or full attention."""

    def __init__(self, workers: Sequence[SimulatedWorker]) -> None:
        self._of: dict[int, dict[int, None]] = {}
        groups = workers[0].store.groups
        widest = max(range(len(groups)), key=lambda g: groups[g].window or float("inf"), default=-1)
        for worker in workers if widest >= 0 else ():
            worker.store.tell = self._listen(worker.number, widest)

    def of(self, blocks: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` workers that hold the deepest of these blocks that any holds, the latest ones first."""
        for block in reversed(blocks):
            if found := self._of.get(block):
                return tuple(found)[: -most - 1 : -1]
        return ()

    def note(self, number: int, blocks: Sequence[int], *, kept: bool) -> None:
        """A worker registered or dropped these blocks."""
        for block in blocks:
            if kept:
                self._of.setdefault(block, {})[number] = None
            elif holders := self._of.get(block):
                holders.pop(number, None)
                if not holders:
                    del self._of[block]

    def _listen(self, number: int, group: int) -> Callable[[int, Sequence[int], bool], None]:
        def tell(of: int, blocks: Sequence[int], kept: bool) -> None:
            if of == group:
                self.note(number, blocks, kept=kept)

        return tell
