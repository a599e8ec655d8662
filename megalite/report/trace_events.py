"""Events for Chrome's and Perfetto's trace viewers (the Trace Event Format): one process per rank. For a
run without traced steps, the simulated step with named bubbles.
"""

from typing import Any

from megalite.report.pipeline import KINDS, DrawnSpan, simulated
from megalite.report.read import RunFolder

Event = dict[str, Any]
MICROSECONDS = 1e6


def simulated_events(run: RunFolder) -> list[Event]:
    """A step of the run's program on each rank of the pipe axis, scaled to the median step, or to one second. Empty if
    the run has one stage or no about.json."""
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
    """The event that names a rank's process."""
    return {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}


def with_bubbles(spans: list[DrawnSpan], end: float) -> list[DrawnSpan]:
    """A rank's actions and the bubbles between them, each named by the action that it waits for."""
    result: list[DrawnSpan] = []
    last = 0.0
    for span in spans:
        if span.start > last:
            name = "start" if last == 0 else f"wait for {span.name}"
            result.append(DrawnSpan("bubble", f"bubble: {name}", last, span.start))
        result.append(span)
        last = span.end
    if end > last:
        result.append(DrawnSpan("bubble", "bubble: end", last, end))
    return result
