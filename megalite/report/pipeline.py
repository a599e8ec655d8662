"""One step on the ranks of the pipe axis as a strip chart: simulated from the program, and measured if the run has
traced a step. Empty parts are the bubble."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megalite.report.numbers import percent

WIDTH, ROW, LEFT = 640, 26, 64
KINDS = {"F": "forward", "B": "backward", "I": "backward to the input", "W": "weight gradients"}


@dataclass
class DrawnSpan:
    """An action, or a wait, in any unit of time. kind: of KINDS."""

    kind: str
    name: str
    start: float
    end: float


Rows = list[list[DrawnSpan]]
"""The spans of each rank of the pipe axis."""


def simulated(pipeline: dict[str, Any]) -> Rows:
    """The simulated step of about.json."""
    rows: Rows = []
    for actions in pipeline.get("actions", []):
        spans = [
            DrawnSpan(kind, f"{kind}{chunk}.{k}", *times) for kind, chunk, k, *times in actions
        ]
        rows.append(spans)
    return rows


def measured(trace: Sequence[dict[str, Any]], axes: dict[str, int]) -> tuple[int, Rows]:
    """The last step that was traced on this grid, and its actions on the first rank of each index of the pipe axis, in
    seconds. Steps of earlier starts on another grid do not count; (0, []) if there is no step."""
    actions = [event for event in trace if event.get("cat") == "action"]
    actions = [event for event in actions if event["args"].get("grid") == axes]
    if not actions or not axes:
        return 0, []
    step = max(event["args"]["step"] for event in actions)
    width = math.prod(axes.values()) // axes["pipe"]
    rows: Rows = [[] for _ in range(axes["pipe"])]
    for event in actions:
        pipe_rank, column = divmod(event["pid"], width)
        if event["args"]["step"] == step and column == 0:
            start = event["ts"] / 1e6
            span = DrawnSpan(
                event["args"]["kind"], event["name"], start, start + event["dur"] / 1e6
            )
            rows[pipe_rank].append(span)
    return step, rows


def bubble(rows: Rows) -> float:
    """The share of the time between the first and the last action in which ranks are idle, on average."""
    start, end = _bounds(rows)
    busy = sum(span.end - span.start for row in rows for span in row)
    return 1 - busy / (len(rows) * (end - start)) if end > start else 0.0


def strip(rows: Rows, caption: str) -> str:
    """The strip chart as SVG."""
    start, end = _bounds(rows)
    if end <= start:
        return ""
    scale = (WIDTH - LEFT - 4) / (end - start)
    parts = []
    for number, row in enumerate(rows):
        y = number * ROW
        parts.append(f'<text x="0" y="{y + 17}">pipe {number}</text>')
        width = WIDTH - LEFT - 4
        idle = 1 - sum(span.end - span.start for span in row) / (end - start)
        hint = f"<title>bubble: rank {number} of the pipe axis is idle {percent(idle)} of the step</title>"
        parts.append(
            f'<rect class="bubble" x="{LEFT}" y="{y + 2}" width="{width}" height="{ROW - 4}">{hint}</rect>'
        )
        parts += [_rect(span, y, start, scale) for span in row]
    kinds = {span.kind for row in rows for span in row}
    legend = "".join(
        f'<span><i class="kind{kind}"></i>{KINDS[kind]}</span>' for kind in KINDS if kind in kinds
    )
    return (
        f'<figure><figcaption>{caption}</figcaption><svg class="strip" role="img" aria-label="{caption}" '
        f'viewBox="0 0 {WIDTH} {len(rows) * ROW}">{"".join(parts)}</svg>'
        f'<p class="legend">{legend}<span><i class="bubble"></i>bubble</span></p></figure>'
    )


def _rect(span: DrawnSpan, y: float, start: float, scale: float) -> str:
    x, width = LEFT + (span.start - start) * scale, max(0.5, (span.end - span.start) * scale)
    hint = f"<title>{span.name}: {KINDS.get(span.kind, span.kind)}</title>"
    return (
        f'<rect class="kind{span.kind}" x="{x:.2f}" y="{y + 2}" width="{width:.2f}" '
        f'height="{ROW - 4}">{hint}</rect>'
    )


def _bounds(rows: Rows) -> tuple[float, float]:
    spans = [span for row in rows for span in row]
    if not spans:
        return 0.0, 0.0
    return min(span.start for span in spans), max(span.end for span in spans)
