"""The contents of a run folder, as values. Anything may be missing or torn: a killed run has a report too.

Next: page.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.errors import DataError

Row = dict[str, Any]

METRICS, ABOUT, HISTORY, FAULTS = "metrics.jsonl", "about.json", "history.jsonl", "faults.jsonl"
TRACE, REPORT = "trace.json", "report.html"
STOPPED_BY_ERROR = "error: "  # prefix of the reason why a start ended, if it is an error
MOST_ROWS = 20_000  # parsed of a long run; evaluations are always parsed


@dataclass
class CheckpointFolder:
    """A checkpoint's folder; bytes: of its files."""

    name: str
    bytes: int
    latest: bool
    best: bool

    @property
    def called(self) -> str:
        """The pointers in `checkpoints/` that name it."""
        names = {"latest": self.latest, "best": self.best}
        return ", ".join(name for name, is_so in names.items() if is_so)


@dataclass
class RunFolder:
    """steps: rows of training. evaluations: rows with a validation loss or samples. about: what the run wrote about
    itself at its start. history: its starts, checkpoints and ends. faults: faulty steps. summaries: of starts that hung
    or lost a rank, by folder. trace: events of traced steps."""

    path: Path
    config: Row = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    about: Row = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
    faults: list[Row] = field(default_factory=list)
    summaries: dict[str, str] = field(default_factory=dict)
    checkpoints: list[CheckpointFolder] = field(default_factory=list)
    trace: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def memory(self) -> Row:
        """The newest row with bytes by rank; empty if there is none."""
        return next((row for row in reversed(self.steps) if "weights_bytes" in row), {})

    @property
    def last(self) -> Row:
        """The last row of training; empty if there is none."""
        return self.steps[-1] if self.steps else {}

    @property
    def best(self) -> Row | None:
        """The evaluation with the lowest loss."""
        losses = [row for row in self.evaluations if row.get("valid_loss") is not None]
        return min(losses, key=lambda row: row["valid_loss"], default=None)


def read_run(path: Path) -> RunFolder:
    """Reads a run folder. Raises DataError if it is not one."""
    if not (path / METRICS).is_file() and not (path / "config.json").is_file():
        raise DataError(f"{path}: must be a run folder, with a config.json or a {METRICS}")
    run = RunFolder(path, config=_json(path / "config.json"), about=_json(path / ABOUT))
    for row in _metrics(path / METRICS):
        if "loss" in row:
            run.steps.append(row)
        if "valid_loss" in row or "samples" in row:
            run.evaluations.append(row)
    run.history, run.faults = [*_rows(path / HISTORY)], [*_rows(path / FAULTS)]
    run.summaries = {
        file.parent.name: file.read_text(errors="replace").partition("\n")[0]
        for file in sorted(path.glob("faults/*/summary.txt"))
    }
    run.checkpoints = _checkpoints(path / "checkpoints")
    run.trace = _json(path / TRACE).get("traceEvents", [])
    return run


def value_at(document: Any, *keys: str) -> Any:
    """A value of nested objects; None if they have no such key."""
    for key in keys:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _metrics(path: Path) -> Iterator[Row]:
    """Rows of the file. Of a long run, only every k-th step, evaluations and rows with memory are parsed."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    every = -(-len(lines) // MOST_ROWS)
    for number, line in enumerate(lines):
        wanted = number % every == 0 or number == len(lines) - 1
        if wanted or any(word in line for word in (b'"valid_loss"', b'"samples"', b"_bytes")):
            yield from _parsed(line)


def _rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        yield from _parsed(line)


def _parsed(line: bytes) -> Iterator[Row]:
    """The row of a line; nothing if the line is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return
    if isinstance(row, dict):
        yield row


def _json(path: Path) -> Row:
    """The object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _pointer(path: Path) -> str:
    """The name in a file; empty if there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _checkpoints(folder: Path) -> list[CheckpointFolder]:
    latest, best = _pointer(folder / "latest"), _pointer(folder / "best")
    found = []
    for path in sorted(folder.glob("step_*")):
        number = path.name.removeprefix("step_")
        if path.is_dir() and number.isdigit():
            try:
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            except OSError:
                continue  # the run has just removed it
            pointed = path.name == latest, path.name == best
            found.append(CheckpointFolder(path.name, size, *pointed))
    return found
