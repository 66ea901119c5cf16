"""The AND of the last few of a row of bit sets, kept up as the row goes on."""

from __future__ import annotations


class SlidingAnd:
    """A queue of integers with the AND of all in it. Each costs a constant on average, whatever the queue's length."""

    __slots__ = ("_back", "_back_and", "_front", "_num_dropped", "_num_pushed")

    def __init__(self) -> None:
        self._back: list[int] = []
        self._back_and = -1
        self._front: list[int] = []
        """The oldest last; each entry is the AND of itself and all above it."""
        self._num_pushed = self._num_dropped = 0

    def push(self, bits: int) -> None:
        self._back.append(bits)
        self._back_and &= bits
        self._num_pushed += 1

    def drop_before(self, number: int) -> None:
        """Drop what was pushed before the entry of this number, counted from 0."""
        for _ in range(min(number, self._num_pushed) - self._num_dropped):
            if not self._front:
                self._turn()
            self._front.pop()
            self._num_dropped += 1

    @property
    def value(self) -> int:
        """-1, all bits, of an empty queue."""
        return (self._front[-1] if self._front else -1) & self._back_and

    def _turn(self) -> None:
        bits = -1
        while self._back:
            bits &= self._back.pop()
            self._front.append(bits)
        self._back_and = -1
