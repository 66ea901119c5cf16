"""What landed, on its way to the device: copied on a thread and a stream of its own, before its request decodes."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import torch

from disagg.cache.cache import KVCache
from disagg.engine.commands import AttemptKey, Command, Decode, PrefixLanded
from disagg.worker.device import use_device

log = logging.getLogger(__name__)

Slots = Sequence[Sequence[int]]
"""Per layer group, slots that a transfer filled."""

OnFault = Callable[[AttemptKey, BaseException], None]


class TakingIn:
    """Hands commands on to the model thread, `Decode` and `PrefixLanded` once their KV is on the device. Event loop
    only.

    What is said of an attempt while its copy runs, such as its release, waits behind the copy: until then no other
    attempt is given its slots. Commands of other attempts do not wait. Where kernels read what peers write nothing is
    copied.
    """

    def __init__(
        self, cache: KVCache, device: str, submit: Callable[[Command], None], executor: Executor | None = None
    ) -> None:
        """`executor`: of one thread; without it this makes one that uses `device`."""
        self._cache, self._device, self._submit = cache, torch.device(device), submit
        self._executor = executor or ThreadPoolExecutor(1, "taking in", initializer=use_device, initargs=(device,))
        self._stream: torch.cuda.Stream | None = None
        self._lanes: dict[AttemptKey, deque[Command]] = {}

    def submit(self, command: Command) -> None:
        """In order within an attempt."""
        if (lane := self._lanes.get(command.key)) is not None:
            lane.append(command)
        else:
            self._submit(command)

    def decode(self, command: Decode | PrefixLanded, slots: Slots, on_fault: OnFault) -> None:
        """Copy `slots`, then hand `command` on. `on_fault`: the copy failed, and the command was dropped."""
        if not self._cache.is_staged or not any(slots):
            self.submit(command)
            return
        assert command.key not in self._lanes, "one transfer per attempt"
        self._lanes[command.key] = deque([command])
        loop = asyncio.get_running_loop()
        copied = loop.run_in_executor(self._executor, self._copy, slots)
        copied.add_done_callback(lambda done: self._end(command.key, done, on_fault))

    def close(self) -> None:
        """Wait for the copy that runs."""
        self._executor.shutdown()

    def _copy(self, slots: Slots) -> None:
        if self._device.type != "cuda":
            self._take_in(slots)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # After what is queued: kernels of a slot's last owner may still read it, and its zeroing may still be queued.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._take_in(slots)
        self._stream.synchronize()

    def _take_in(self, slots: Slots) -> None:
        for group, some in enumerate(slots):
            self._cache.take_in(group, some)

    def _end(self, key: AttemptKey, copied: asyncio.Future[None], on_fault: OnFault) -> None:
        lane = self._lanes.pop(key)
        fault = asyncio.CancelledError() if copied.cancelled() else copied.exception()
        if fault is not None:
            log.error("KV that landed cannot be copied to %s", self._device, exc_info=fault)
            lane.popleft()
        for command in lane:
            self._submit(command)
        if fault is not None:
            on_fault(key, fault)
