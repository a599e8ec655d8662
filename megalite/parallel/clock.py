"""How long this rank computes, not counting what it waits for others: the figure that tells a slow rank from those
that wait for it.

On a CPU by the clock on the wall; on other devices by events on the current stream, without waiting: they are
read after a later step has synchronised anyway. Not a profiler: `on` is set for a step now and then.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch

from megalite.config.rules import machine_has_gpu


class Clock:
    """`computing` goes around work of this rank's own, `waiting` around collectives and messages within it."""

    def __init__(self) -> None:
        self.on = False
        self._depth = 0
        self._spans: list[tuple[int, Any, Any]] = []

    @functools.cached_property
    def by_events(self) -> bool:
        # Not torch.accelerator's word: ranks on a CPU may have GPUs beside them.
        return machine_has_gpu()

    def computing(self) -> contextlib.AbstractContextManager[None]:
        return self._span(1) if self.on else _NOTHING

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        return self._span(-1) if self._depth else _NOTHING

    def take(self) -> float:
        """Seconds since the last call; on a device, call it after that has been waited for."""
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
        if sign > 0 or self._depth == 1:  # a wait within a wait is counted once
            self._spans.append((sign, start, self._now()))

    def _now(self) -> Any:
        if not self.by_events:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event


_NOTHING = contextlib.nullcontext()

RANK_CLOCK = Clock()
"""This process's: a process is one rank, and what it computes and waits for is one figure."""
