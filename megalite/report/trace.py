"""Events for Chrome's and Perfetto's trace viewers (the Trace Event Format): a process a rank, a row a kind of work.

Of a run that traced no step, the simulated step, with its bubbles by name.
"""

from typing import Any

from megalite.report.pipeline import KINDS, Span, simulated
from megalite.report.read import RunFolder

Event = dict[str, Any]
MICROSECONDS = 1e6


def simulated_events(run: RunFolder) -> list[Event]:
    """A step of the run's program on each place of the pipe axis; as long as the run's steps are in the median, or a
    second. Empty where the run has one stage or has not told of it."""
    rows = simulated(run.about.get("pipeline", {}))
    if len(rows) < 2:
        return []
    length = max(span.end for row in rows for span in row)
    seconds = sorted(row["step_seconds"] for row in run.steps if "step_seconds" in row) or [1.0]
    scale = seconds[len(seconds) // 2] / length * MICROSECONDS
    events: list[Event] = []
    for place, spans in enumerate(rows):
        events.append(process_name(place, f"pipe {place}, simulated"))
        for span in with_bubbles(spans, length):
            events.append(
                {
                    "name": span.name,
                    "cat": "bubble" if span.kind == "bubble" else "action",
                    "ph": "X",
                    "pid": place,
                    "tid": 0,
                    "ts": span.start * scale,
                    "dur": (span.end - span.start) * scale,
                    "args": {"step": 0, "kind": KINDS.get(span.kind, span.kind)},
                }
            )
    return events


def process_name(pid: int, name: str) -> Event:
    """The name of a rank's rows."""
    return {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}


def with_bubbles(spans: list[Span], end: float) -> list[Span]:
    """A rank's actions, and between them what it waits through, named by the action that it waits for."""
    result: list[Span] = []
    last = 0.0
    for span in spans:
        if span.start > last:
            name = "start" if last == 0 else f"wait for {span.name}"
            result.append(Span("bubble", f"bubble: {name}", last, span.start))
        result.append(span)
        last = span.end
    if end > last:
        result.append(Span("bubble", "bubble: end", last, end))
    return result
