"""This rank's activity as named spans, for steps that are traced or whose time is split up.

When off, a span costs one test of a flag. When on, spans on a CPU use wall-clock time; on other devices they use events
on the current stream, without synchronizing before `take`. parallel/clock.py measures only one sum and is cheaper.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Span:
    """kind: `action`, `receive`, `send`, `sent` (a wait until a message has been sent), `collective`, `data` or
    `update`; what: the action, message or name; inside: kind of the enclosing span, empty if there is none; start and
    end: seconds of this rank's `time.perf_counter`, valid after `take`."""

    kind: str
    what: Any
    inside: str
    start: Any
    end: Any = None


class Timeline:
    """The timeline of one rank; since a process is one rank, there is only one (RANK_TIMELINE)."""

    def __init__(self) -> None:
        self.on = False
        self._spans: list[Span] = []
        self._open: list[str] = []
        self._base: tuple[float, Any] = (0.0, None)

    def begin(self, device: torch.device) -> None:
        """Turns the timeline on. Synchronizes once with a GPU, so that both clocks have a common zero."""
        self._spans, self._open, self.on = [], [], True
        if device.type == "cpu":
            self._base = 0.0, None
            return
        torch.accelerator.synchronize(device)
        event = torch.Event(enable_timing=True)
        event.record()
        self._base = time.perf_counter(), event

    def span(self, kind: str, what: Any) -> contextlib.AbstractContextManager[None]:
        """Context manager that records a span. `what` must not change afterwards."""
        return self._span(kind, what) if self.on else _NOTHING

    def take(self, wait: bool) -> list[Span]:
        """Turns the timeline off and returns its spans in the order of their ends. wait: whether to synchronize with
        the device; otherwise spans that the device has not finished are left out."""
        spans, self._spans, self.on = self._spans, [], False
        zero, base = self._base
        if base is None:
            return spans
        if wait:
            torch.accelerator.synchronize()
        done = [span for span in spans if span.end.query()]
        for span in done:
            span.start = zero + base.elapsed_time(span.start) / 1000
            span.end = zero + base.elapsed_time(span.end) / 1000
        return done

    @contextlib.contextmanager
    def _span(self, kind: str, what: Any) -> Iterator[None]:
        span = Span(kind, what, self._open[-1] if self._open else "", self._now())
        self._open.append(kind)
        try:
            yield
        finally:
            self._open.pop()
            span.end = self._now()
            self._spans.append(span)

    def _now(self) -> Any:
        if self._base[1] is None:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event


_NOTHING = contextlib.nullcontext()

RANK_TIMELINE = Timeline()
"""The timeline of this process."""
