"""The ranks as a table, one row per index of the pipe axis, with each rank's memory: predicted and measured."""

import itertools
from html import escape
from itertools import chain
from typing import Any

from megalite.report.numbers import gib
from megalite.report.tables import table, wide
from megalite.topology.axes import in_short

STATES = {
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer",
}
MOST_CELLS = 256  # at most; of more ranks the first are shown

Bytes = dict[str, int]


def grid_picture(axes: dict[str, int], predicted: list[Bytes], memory: dict[str, Any]) -> str:
    """axes: sizes by name, outermost first; `pipe` is the first. predicted: for each rank, fields of STATES and others.
    memory: measured lists by rank. Either may be empty."""
    if not axes:
        return ""
    pipe, *others = axes.items()
    columns_at = [*itertools.product(*(range(size) for _, size in others))]
    width = len(columns_at)
    columns = min(width, MOST_CELLS)
    shown = min(pipe[1], max(1, MOST_CELLS // columns))
    measured = _by_rank(memory)
    most = max([_sum(states) for states in (*predicted, *measured)] or [1]) or 1
    head = "".join(f"<th>{_coordinates(others, at)}</th>" for at in columns_at[:columns])
    rows = [f"<tr><th></th>{head}</tr>"]
    for row in range(shown):
        ranks = range(row * width, row * width + columns)
        cells = [_cell(rank, predicted, measured, most) for rank in ranks]
        rows.append(f"<tr><th>{pipe[0]} {row}</th>{''.join(cells)}</tr>")
    parts = [f"{shown:,} of {pipe[1]:,} rows"] if shown < pipe[1] else []
    parts += [f"{columns:,} of {width:,} columns"] if columns < width else []
    note = f"<p>The first {', and the first '.join(parts)}.</p>" if parts else ""
    return f'<div class="wide"><table class="grid">{"".join(rows)}</table></div>{note}{LEGEND}'


LEGEND = (
    '<p class="legend">'
    + "".join(
        f'<span><i class="state{number}"></i>{name}</span>'
        for number, name in enumerate(STATES.values())
    )
    + "<span>upper bar predicted, lower bar measured in the first step</span></p>"
)


def memory_table(predicted: list[Bytes], memory: dict[str, Any]) -> str:
    """Bytes of each rank; ranks with the same figures share a row."""
    measured = _by_rank(memory)
    columns = list(dict.fromkeys([*chain.from_iterable(predicted), *STATES]))
    if measured and "peak_bytes" in measured[0]:
        columns.append("peak_bytes")
    rows: dict[tuple[str, ...], list[int]] = {}
    for rank in range(max(len(predicted), len(measured))):
        cells = tuple(_both(key, rank, predicted, measured) for key in columns)
        rows.setdefault(cells, []).append(rank)
    names = [escape(key.removesuffix("_bytes")) for key in columns]
    body = [(in_short(ranks, "–"), *cells) for cells, ranks in rows.items()]
    return wide(table(["ranks", *names], body))


def _cell(rank: int, predicted: list[Bytes], measured: list[Bytes], most: int) -> str:
    bars, words = [], []
    for name, everyone in (("predicted", predicted), ("measured", measured)):
        if rank < len(everyone):
            states = everyone[rank]
            bars.append(_bar(states, most))
            words.append(f"{name} {gib(_sum(states))}")
    total = gib(_sum(measured[rank])) if rank < len(measured) else ""
    title = escape(f"rank {rank}: {', '.join(words)}", quote=True)
    return f'<td title="{title}"><b>{rank}</b> <small>{total}</small>{"".join(bars)}</td>'


def _bar(states: Bytes, most: int) -> str:
    parts = "".join(
        f'<i class="state{number}" style="width:{100 * states.get(key, 0) / most:.2f}%"></i>'
        for number, key in enumerate(STATES)
    )
    return f'<div class="bar">{parts}</div>'


def _both(key: str, rank: int, predicted: list[Bytes], measured: list[Bytes]) -> str:
    """The measured bytes, and the predicted ones if they differ."""
    asked = predicted[rank].get(key) if rank < len(predicted) else None
    found = measured[rank].get(key) if rank < len(measured) else None
    if found is None:
        return "" if asked is None else f"{gib(asked)} <small>predicted</small>"
    if asked is None:
        return gib(found)
    if asked == found:
        return f"{gib(found)} <small>as predicted</small>"
    share = f", {100 * (found / asked - 1):+.2f} %" if asked else ""
    return f"{gib(found)} <small>predicted {gib(asked)}{share}</small>"


def _by_rank(memory: dict[str, Any]) -> list[Bytes]:
    lists = {key: value for key, value in memory.items() if key.endswith("_bytes")}
    lists = {key: value for key, value in lists.items() if isinstance(value, list)}
    count = min(map(len, lists.values()), default=0)
    return [{key: value[rank] for key, value in lists.items()} for rank in range(count)]


def _sum(states: Bytes) -> int:
    return sum(states.get(key, 0) for key in STATES)


def _coordinates(axes: list[tuple[str, int]], coordinates: tuple[int, ...]) -> str:
    """A column's name: its index on each axis of more than one rank."""
    several = [
        f"{name} {at}" for (name, size), at in zip(axes, coordinates, strict=True) if size > 1
    ]
    return "<br>".join(several)
