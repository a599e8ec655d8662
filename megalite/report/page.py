"""The page: one HTML file with style and script inlined, which loads nothing else. Next: report_program.py."""

import json
from collections.abc import Callable, Sequence
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

from megalite.programs.schedules import SCHEDULES
from megalite.report import pipeline, run_timeline
from megalite.report.charts import COLOURS, Chart, Curve, Mark, Points, smoothed, svg, thinned
from megalite.report.numbers import clock, gib, percent, short
from megalite.report.rank_table import grid_picture, memory_table
from megalite.report.read import RunFolder, value_at
from megalite.report.tables import table, wide

CURVES = {  # field of a row -> (title, smoothed, axis from 0); a loss title gets its unit
    "loss": ("Training loss", True, False),
    "grad_norm": ("Gradient norm, before clipping", True, True),
    "learning_rate": ("Learning rate", False, True),
    "tokens_per_second": ("Tokens per second", True, True),
    "mfu": ("MFU, %", True, True),
}
FACTORS = {"mfu": 100.0}
SHOWN_SAMPLES = 3  # evaluations whose samples are expanded


START = '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'


def page(runs: Sequence[RunFolder], base: Path) -> str:
    """The whole page. base: the folder that it will be in, for links."""
    style, script = (_beside(name) for name in ("page.css", "page.js"))
    title = " · ".join(run.name for run in runs)
    body = [_header(title), _legend(runs), _comparison(runs) if len(runs) > 1 else _tiles(runs[0])]
    body.append(_section("Curves", f'<div class="charts">{_charts(runs)}</div>'))
    for run in runs:
        body += _details(run, base, several=len(runs) > 1)
    return (
        START + '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'{"".join(body)}<div id="hover"></div><script>{script}</script></body></html>\n'
    )


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _header(title: str) -> str:
    return f'<header><h1>{escape(title)}</h1><button id="theme" type="button">light / dark</button></header>'


def _legend(runs: Sequence[RunFolder]) -> str:
    if len(runs) == 1:
        return ""
    names = [
        f'<span><i class="c{number % COLOURS}"></i>{escape(run.name)}</span>'
        for number, run in enumerate(runs)
    ]
    return f'<p class="legend">{"".join(names)}</p>'


def _section(title: str, content: str) -> str:
    """A section; empty if there is no content."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


Facts = dict[str, str]


def _facts(run: RunFolder) -> Facts:
    """Key figures of a run, by name."""
    facts: Facts = {}
    last, best, steps = run.last, run.best, value_at(run.config, "megalite", "train", "steps")
    if model := run.about.get("model"):
        facts["model"] = str(model)
    if parameters := run.about.get("parameters"):
        facts["parameters"] = short(parameters)
    if last:
        facts["steps"] = f"{last['step']:,}" + (f" of {steps:,}" if steps else "")
        facts["tokens"] = short(last.get("consumed_tokens", 0))
        facts["last training loss"] = _number(last.get("loss"))
    if best is not None:
        facts["best validation loss"] = f"{best['valid_loss']:.4f} at step {best['step']}"
    recent = [row for row in run.steps[-50:] if "tokens_per_second" in row]
    if recent:
        mean = sum(row["tokens_per_second"] for row in recent) / len(recent)
        facts["tokens per second"] = short(mean)
    if recent and all("mfu" in row for row in recent):
        facts["MFU"] = percent(sum(row["mfu"] for row in recent) / len(recent))
    if "goodput" in last:
        facts["goodput"] = percent(last["goodput"])
    if found := run_timeline.starts(run):
        facts["time"] = clock(sum(start.end - start.begin for start in found))
        facts["starts"] = str(len(found))
    if axes := run.about.get("grid"):
        facts["grid"] = " × ".join(f"{name} {size}" for name, size in axes.items())
    return facts


def _tiles(run: RunFolder) -> str:
    tiles = [
        f"<div><span>{name}</span><b>{escape(text)}</b></div>" for name, text in _facts(run).items()
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _comparison(runs: Sequence[RunFolder]) -> str:
    """A column for each run: its figures, and the keys of the configs that differ between them."""
    rows: list[list[str]] = []
    facts = [_facts(run) for run in runs]
    for name in dict.fromkeys(chain.from_iterable(facts)):
        rows.append([name, *(of_run.get(name, "") for of_run in facts)])
    configs = [_flat(run.config) for run in runs]
    for key in dict.fromkeys(chain.from_iterable(configs)):
        values = [config.get(key) for config in configs]
        if any(value != values[0] for value in values):
            rows.append([key, *("" if value is None else json.dumps(value) for value in values)])
    colours = [f'<i class="c{number % COLOURS}"></i>' for number in range(len(runs))]
    heads = [f"{colour} {escape(run.name)}" for colour, run in zip(colours, runs, strict=True)]
    cells = [[escape(text) for text in row] for row in rows]
    return wide(table(["", *heads], cells, long=range(1, len(runs) + 1)))


def _charts(runs: Sequence[RunFolder]) -> str:
    marks = [Mark(*mark) for run in runs for mark in run_timeline.marks_of(run)]
    parts = []
    for key, (title, smooth, zero) in CURVES.items():
        curves: list[Curve] = []
        for number, run in enumerate(runs):
            points = _points(run.steps, key)
            if smooth and len(points) > 1:
                curves.append(Curve(run.name, number, thinned(points), faint=True))
                points = smoothed(points)
            curves.append(Curve(run.name, number, thinned(points)))
        title = f"{title}, {_loss_unit(runs)}" if key == "loss" else title
        parts.append(svg(Chart(title, curves, zero, marks)))
        if key == "loss":
            title = f"Validation loss, {_loss_unit(runs)}"
            parts.append(svg(Chart(title, _validation(runs), False, marks)))
    return "".join(parts)


def _loss_unit(runs: Sequence[RunFolder]) -> str:
    """The unit of a loss: per token, or per text for a classifier."""
    units = {run.about.get("loss_unit", "nats per token") for run in runs}
    return units.pop() if len(units) == 1 else "nats"


def _validation(runs: Sequence[RunFolder]) -> list[Curve]:
    return [
        Curve(run.name, number, thinned(_points(run.evaluations, "valid_loss")), dots=True)
        for number, run in enumerate(runs)
    ]


def _points(rows: Sequence[dict[str, Any]], key: str) -> Points:
    """(step, value) of the rows that have a value."""
    factor = FACTORS.get(key, 1.0)
    return [(row["step"], factor * row[key]) for row in rows if row.get(key) is not None]


def _details(run: RunFolder, base: Path, several: bool) -> list[str]:
    """The sections about one run."""
    sections: dict[str, Callable[[], str]] = {
        "Samples": lambda: _samples(run),
        "Time, restarts, faults": lambda: run_timeline.picture(run) + run_timeline.table(run),
        "Ranks and memory": lambda: _memory(run),
        "Pipeline": lambda: _pipeline(run),
        "Step time": lambda: _split(run),
        "Data": lambda: _data(run),
        "Checkpoints": lambda: _checkpoints(run, base),
        "Config": lambda: _config(run),
    }
    prefix = f"{run.name}: " if several else ""
    return [_section(prefix + title, made()) for title, made in sections.items()]


def _samples(run: RunFolder) -> str:
    with_samples = [row for row in run.evaluations if row.get("samples")]
    parts = []
    for number, row in enumerate(reversed(with_samples)):
        texts = "".join(
            f'<pre class="text"><span class="prompt">{escape(one["prompt"])}</span>{escape(one["text"])}</pre>'
            for one in row["samples"]
        )
        opened = " open" if number < SHOWN_SAMPLES else ""
        parts.append(f"<details{opened}><summary>step {row['step']}</summary>{texts}</details>")
    return "".join(parts)


def _memory(run: RunFolder) -> str:
    axes, predicted = run.about.get("grid", {}), run.about.get("predicted", [])
    if not axes or not (predicted or run.memory):
        return ""
    picture = grid_picture(axes, predicted, run.memory)
    words = "States of each rank, predicted from the config and measured at the first step of the last start."
    table = memory_table(predicted, run.memory)
    return f"<p>{words}</p>{picture}<details><summary>in figures</summary>{table}</details>"


def _pipeline(run: RunFolder) -> str:
    about, axes = run.about.get("pipeline", {}), run.about.get("grid", {})
    rows = pipeline.simulated(about)
    if len(rows) < 2:
        return ""
    schedule, m, shown = about["schedule"], about["micro_batches"], about["shown_micro_batches"]
    p, v = len(rows), about["chunks"]
    lines = [f"Schedule {schedule}, {m} micro-batches per step."]
    lines.append(f"Bubble simulated with this model's cut: {percent(about['bubble'])}.")
    if schedule in SCHEDULES:
        formula, share = SCHEDULES[schedule].bubble(p, m, v)
        lines.append(f"Formula for equal stages: {formula} = {percent(share)}.")
    step, measured = pipeline.measured(run.trace, axes)
    if measured:
        lines.append(f"Measured in step {step}: {percent(pipeline.bubble(measured))}.")
    some = f", the first {shown} of {m} micro-batches" if shown < m else ""
    strips = pipeline.strip(rows, f"Simulated{some}")
    if measured:
        strips += pipeline.strip(measured, f"Measured, step {step}")
    return f"<p>{' '.join(lines)}</p>{strips}"


def _split(run: RunFolder) -> str:
    """What the time of the measured steps was spent on, with shares."""
    rows = [row for row in run.steps if "split_seconds" in row]
    if not rows:
        return ""
    whole = sum(row["step_seconds"] for row in rows)
    sums: dict[str, float] = {}
    for row in rows:
        for name, seconds in row["split_seconds"].items():
            sums[name] = sums.get(name, 0.0) + seconds
    body = [
        (escape(name), f"{seconds / len(rows):.4g} s", percent(seconds / whole))
        for name, seconds in sums.items()
    ]
    words = f"Means over the ranks and {len(rows)} measured steps."
    return f"<p>{words}</p>{table(('', 'per step', 'share'), body)}"


def _data(run: RunFolder) -> str:
    found = run_timeline.shares(run)
    if not found:
        return ""
    total = sum(share["samples"] for share in found) or 1
    body = []
    for share in found:
        given, asked = percent(share["samples"] / total), percent(share["asked"])
        body.append((escape(share["path"]), f"{share['samples']:,}", given, asked))
    return wide(table(("corpus", "samples", "share", "asked"), body, long=(0,)))


def _checkpoints(run: RunFolder, base: Path) -> str:
    if not run.checkpoints:
        return ""
    here = _relative(run.path / "checkpoints", base)
    rows = []
    for found in run.checkpoints:
        address = escape(f"{here}/{found.name}", quote=True)
        link = f'<a href="{address}/">{found.name}</a>'
        rows.append((link, gib(found.bytes), found.called))
    return wide(table(("folder", "size", ""), rows))


def _config(run: RunFolder) -> str:
    if not run.config:
        return ""
    rows = []
    for key, value, default in run.about.get("differing", []):
        usual = "" if default is None else json.dumps(default)
        rows.append([escape(text) for text in (key, json.dumps(value), usual)])
    differing = ""
    if rows:
        words = "<p>Keys that differ from their defaults, or have none:</p>"
        differing = words + wide(table(("key", "value", "default"), rows, long=range(3)))
    whole = escape(json.dumps(run.config, indent=2, ensure_ascii=False))
    return f"{differing}<details><summary>config.json</summary><pre>{whole}</pre></details>"


def _relative(path: Path, base: Path) -> str:
    """`path` relative to the page's folder, so that a run folder may be moved with its page."""
    path, base = path.resolve(), base.resolve()
    up = 0
    while not path.is_relative_to(base):
        base, up = base.parent, up + 1
    return "../" * up + path.relative_to(base).as_posix()


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Values by their dotted paths."""
    if not isinstance(value, dict):
        return {key: value}
    found: dict[str, Any] = {}
    for name, part in value.items():
        found |= _flat(part, f"{key}.{name}" if key else name)
    return found


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
