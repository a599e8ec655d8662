"""What this rank does when, as named spans: for a step now and then that is traced, or whose time is split up.

Off, a span costs a test of a flag. On, a CPU's are taken by the clock on the wall, other devices' by events on the
current stream, for which nothing waits before `take`. parallel/clock.py measures one sum, and is cheaper.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Span:
    """kind: `action`, `receive`, `send`, `sent` (a wait until a message is gone), `collective`, `data` or `update`;
    what: the action, message or name; inside: kind of the span that holds it, empty where none does; start and end:
    seconds by this rank's `time.perf_counter`, once they are taken."""

    kind: str
    what: Any
    inside: str
    start: Any
    end: Any = None


class Timeline:
    """Of one rank; a process is a rank, so there is one (RANK_TIMELINE)."""

    def __init__(self) -> None:
        self.on = False
        self._spans: list[Span] = []
        self._open: list[str] = []
        self._base: tuple[float, Any] = (0.0, None)

    def begin(self, device: torch.device) -> None:
        """Turns it on. The host waits once for a device that is no CPU, so that both clocks have a common zero."""
        self._spans, self._open, self.on = [], [], True
        if device.type == "cpu":
            self._base = 0.0, None
            return
        torch.accelerator.synchronize(device)
        event = torch.Event(enable_timing=True)
        event.record()
        self._base = time.perf_counter(), event

    def span(self, kind: str, what: Any) -> contextlib.AbstractContextManager[None]:
        """Goes around something; what must not change afterwards."""
        return self._span(kind, what) if self.on else _NOTHING

    def take(self, wait: bool) -> list[Span]:
        """Turns it off and returns its spans in the order of their ends. wait: for the device; else spans that it has
        not come to yet are left out."""
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
"""This process's."""
