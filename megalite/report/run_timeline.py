"""A run over wall-clock time: its starts as bars, with checkpoints, faults and the gaps between them."""

from dataclasses import dataclass
from html import escape
from typing import Any

from megalite.report import tables
from megalite.report.numbers import clock, date
from megalite.report.read import RunFolder
from megalite.report.tables import wide

WIDTH, HEIGHT, LEFT = 640, 46, 4


@dataclass
class RunStart:
    """One start of a run. end, last_step: when it ended or last wrote a row. reason: empty if there is none, as after a
    kill."""

    begin: float
    end: float
    step: int
    last_step: int
    reason: str
    grid: str


def starts(run: RunFolder) -> list[RunStart]:
    """The starts in order. A killed start ends with the last row that it wrote."""
    found: list[RunStart] = []
    for row in run.history:
        at, step = row.get("unix_seconds", 0.0), row.get("step", 0)
        if row.get("event") == "start":
            if found and not found[-1].reason:
                found[-1].end = max(found[-1].end, min(row.get("last_seen") or 0.0, at))
            found.append(RunStart(at, at, step, step, "", row.get("grid", "")))
        elif found:
            found[-1].end, found[-1].last_step = at, step
            if row.get("event") == "end":
                found[-1].reason = row.get("reason", "")
    if found and not found[-1].reason and (last := run.last.get("unix_seconds")):
        found[-1].end = max(found[-1].end, last)
        found[-1].last_step = max(found[-1].last_step, run.last["step"])
    return found


def fault_times(run: RunFolder) -> list[tuple[float, str]]:
    """(unix time, text) of each fault. The time is that of its step's row, or of the previous one."""
    times = [(row["step"], row["unix_seconds"]) for row in run.steps if "unix_seconds" in row]
    result = []
    for fault in run.faults:
        text = f"step {fault.get('step')}: {fault.get('text')} ({fault.get('action')})"
        if "unix_seconds" in fault:
            result.append((fault["unix_seconds"], text))
        elif before := [at for step, at in times if step <= fault.get("step", 0)]:
            result.append((before[-1], text))
    return result


def picture(run: RunFolder) -> str:
    """The bars; empty if the run wrote no history."""
    found = starts(run)
    if not found:
        return ""
    first, last = found[0].begin, max(start.end for start in found)
    scale = (WIDTH - 2 * LEFT) / max(last - first, 1e-3)

    def x(at: float) -> float:
        return LEFT + (at - first) * scale

    parts = [f'<line class="rule" x1="{LEFT}" x2="{WIDTH - LEFT}" y1="20" y2="20"/>']
    for number, start in enumerate(found):
        words = f"start {number + 1}, steps {start.step} to {start.last_step}: {_end(start)}"
        width = max(2.0, (start.end - start.begin) * scale)
        parts.append(
            f'<rect class="start" x="{x(start.begin):.1f}" y="10" width="{width:.1f}" height="20">'
            f"<title>{escape(words)}</title></rect>"
        )
    marks = [
        (row["unix_seconds"], "saved", f"checkpoint of step {row['step']}")
        for row in run.history
        if row.get("event") == "checkpoint"
    ]
    marks += [(at, "fault", text) for at, text in fault_times(run)]
    for at, kind, text in marks:
        parts.append(
            f'<circle class="{kind}" cx="{x(at):.1f}" cy="20" r="4"><title>{escape(text)}</title></circle>'
        )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 2}">{date(first)}</text>')
    parts.append(
        f'<text x="{WIDTH - LEFT}" y="{HEIGHT - 2}" class="end">{clock(last - first)} later</text>'
    )
    legend = (
        '<span><i class="start"></i>running</span><span><i class="saved dot"></i>checkpoint</span>'
    )
    if run.faults:
        legend += '<span><i class="fault dot"></i>fault</span>'
    return (
        f'<svg class="strip" role="img" aria-label="starts of the run" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'{"".join(parts)}</svg><p class="legend">{legend}</p>'
    )


def table(run: RunFolder) -> str:
    """A row for each start, then a list of the faults and of the summaries of failed starts."""
    rows = []
    for number, start in enumerate(starts(run), 1):
        length, steps = clock(start.end - start.begin), f"{start.step} – {start.last_step}"
        ended = escape(_end(start))
        rows.append([str(number), date(start.begin), length, steps, escape(start.grid), ended])
    head = ("start", "at", "for", "steps", "grid", "end")
    result = wide(tables.table(head, rows)) if rows else ""
    lines = [text for _, text in fault_times(run)]
    lines += [f"start {name}: {line}" for name, line in run.summaries.items()]
    if lines:
        result += f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
    return result


def marks_of(run: RunFolder) -> list[tuple[float, str, str]]:
    """(step, kind, text) of the marks on curves over steps: restarts and faults."""
    result: list[tuple[float, str, str]] = [
        (start.step, "restart", f"restarted from step {start.step}") for start in starts(run)[1:]
    ]
    result += [
        (fault["step"], "fault", f"step {fault['step']}: {fault.get('text')}")
        for fault in run.faults
        if isinstance(fault.get("step"), int)
    ]
    return result


def _end(start: RunStart) -> str:
    return start.reason or "no end recorded: killed, or still running"


def shares(run: RunFolder) -> list[dict[str, Any]]:
    """Samples read from each corpus, from the newest row of the history that has them."""
    return next((row["corpora"] for row in reversed(run.history) if "corpora" in row), [])
