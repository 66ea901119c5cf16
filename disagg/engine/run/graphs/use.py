"""What a runner tells of the graphs that it captured and replayed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class GraphUse:
    """Captured graphs, the device memory they took, and how many steps were replayed.

    `refusal`: why none could be captured where they should have been; else empty.
    """

    num_captured: int = 0
    nbytes: int = 0
    num_replays: int = 0
    refusal: str = ""

    def add(self, num_captured: int, nbytes: int) -> None:
        """So many more graphs; what all of them took so far."""
        self.num_captured += num_captured
        self.nbytes = nbytes
