"""This rank's compute time without its waits for other ranks, which distinguishes a slow rank from those that wait for
it.

On a CPU by wall-clock time; on other devices by events on the current stream, without synchronizing: they are read
after a later step has synchronized anyway. Not a profiler: `on` is set only for some steps.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch

from megalite.config.rules import machine_has_gpu


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Clock:
    """`computing` wraps this rank's own work, `waiting` the collectives and messages inside it."""

    def __init__(self) -> None:
        self.on = False
        self._depth = 0
        self._spans: list[tuple[int, Any, Any]] = []

    @functools.cached_property
    def by_events(self) -> bool:
        # Not torch.accelerator.is_available: ranks may compute on the CPU of a machine with GPUs.
        return machine_has_gpu()

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return self._span(1) if self.on else _NOTHING

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        return self._span(-1) if self._depth else _NOTHING

    def take(self) -> float:
        """Compute seconds since the last call. On a GPU, synchronize first."""
        spans, self._spans = self._spans, []
        if self.by_events:
            return sum(sign * start.elapsed_time(end) for sign, start, end in spans) / 1000
        return sum(sign * (end - start) for sign, start, end in spans)

    @contextlib.contextmanager
    def _span(self, sign: int) -> Iterator[None]:
        start = self._now()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if sign > 0 or self._depth == 1:  # nested waits are counted once
            self._spans.append((sign, start, self._now()))

    def _now(self) -> Any:
        if not self.by_events:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event


_NOTHING = contextlib.nullcontext()

RANK_CLOCK = Clock()
"""The clock of this process, which is one rank."""
