"""`metrics.jsonl`: one object per line, floats with all their digits; TensorBoard's events from the same rows.

A run that resumes or rewinds first removes rows after its checkpoint's step and a torn last line, so that no step
appears twice. Each row of training has the run's goodput: the seconds of steps that were kept and not skipped, over all
seconds since the run's first start, which is stored in `first_start.json`.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalite.checkpoint.appended import Appended
from megalite.checkpoint.folder import write_durably
from megalite.data.position import Position
from megalite.training.events import Events
from megalite.training.groups import grouped
from megalite.training.watchers import Row, Watcher

FILE, FIRST_START = "metrics.jsonl", "first_start.json"


class MetricsFile(Watcher):
    """Appends rows to a run's metrics. Made by one rank only."""

    def __init__(
        self,
        run_dir: Path,
        first_step: int,
        tensorboard: bool,
        log: Callable[[str], None],
        evaluates_first: bool = False,
    ) -> None:
        """log: takes lines for the log, about a full disk. evaluates_first: the evaluation after `first_step` is still
        to be done."""
        self.run_dir, self.path, self.tensorboard, self.log = (
            run_dir,
            run_dir / FILE,
            tensorboard,
            log,
        )
        self._open(first_step, evaluates_first)

    def _open(self, first_step: int, evaluates_first: bool) -> None:
        run_dir = self.run_dir
        kept, self.last_seen = _keep_until(self.path, first_step, evaluates_first)
        self.useful_seconds = sum(map(_useful_seconds, kept))
        self.best: Row | None = None
        self.last_step: Row | None = next((row for row in kept[::-1] if "loss" in row), None)
        for row in kept:
            self._remember_best(row)
        self.first_start = _first_start(run_dir, self.useful_seconds)
        self.file = Appended(self.path, self.log)
        self.events = (
            Events(run_dir / "tensorboard", first_step, self.log) if self.tensorboard else None
        )
        with contextlib.suppress(OSError):
            if self.events is not None:
                config = (run_dir / "config.json").read_text()
                self.events.append_text(first_step, "config", f"```json\n{config}```")

    def after_step(self, row: Row) -> None:
        """Writes the row."""
        self.write(row)

    def evaluated(self, row: Row) -> None:
        """Writes the row."""
        self.write(row)

    def rewound(self, position: Position) -> None:
        """Removes the rows of later steps."""
        self.close()
        self._open(position.step, position.owes_evaluation)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row. It is handed to the operating system, or kept in memory while the disk is full. A figure that
        is not finite becomes null, since JSON cannot represent it."""
        self.useful_seconds += _useful_seconds(row)
        if "step_seconds" in row:
            now = row["unix_seconds"] = time.time()
            row["goodput"] = self.useful_seconds / max(now - self.first_start, self.useful_seconds)
        row = _finite(row)
        self._remember_best(row)
        self.file.append(f"{json.dumps(row)}\n".encode())
        if self.events is not None:
            self.events.append(row["step"], grouped(row))
            for number, sample in enumerate(row.get("samples", [])):
                text = f"{sample['prompt']}{sample['text']}"
                self.events.append_text(row["step"], f"valid/sample_{number}", text)

    def _remember_best(self, row: Row) -> None:
        """Updates `best`, the evaluation with the lowest loss."""
        loss = row.get("valid_loss")
        if loss is not None and (self.best is None or loss < self.best["valid_loss"]):
            self.best = row

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()


def perplexity(loss: float) -> float:
    """exp(loss), at most the largest float; not finite if the loss is not."""
    try:
        return math.exp(loss)
    except OverflowError:
        return sys.float_info.max


def _finite(value: Any) -> Any:
    """The value with null in place of each float that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _useful_seconds(row: dict[str, Any]) -> float:
    return 0.0 if "skipped" in row else row.get("step_seconds", 0.0)


def _first_start(run_dir: Path, useful_seconds: float) -> float:
    """Unix time of the run's first start, which that start writes to a file. If there is no file, the latest possible
    time."""
    path = run_dir / FIRST_START
    try:
        return float(json.loads(path.read_text())["unix_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        first = time.time() - useful_seconds
        with contextlib.suppress(OSError):  # full disk: the next start assumes a later time
            write_durably(path, json.dumps({"unix_seconds": first}) + "\n")
        return first


def _keep_until(
    path: Path, step: int, without_evaluation: bool
) -> tuple[list[dict[str, Any]], float]:
    """Keeps only whole rows up to `step` in the file. Returns them, and the latest unix time of all rows that it had
    (0: none). without_evaluation: also removes that step's evaluation: a killed start may have written it without
    saving it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0.0
    rows, lines, last_seen = [], [], 0.0
    for line in content.splitlines():
        try:
            row = json.loads(line)
            last_seen = max(last_seen, row.get("unix_seconds", 0.0))
            made_again = without_evaluation and row["step"] == step and "loss" not in row
            if row["step"] <= step and not made_again:
                rows.append(row)
                lines.append(line + b"\n")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn by a kill, or not a row
    kept = b"".join(lines)
    if content.startswith(kept):
        os.truncate(path, len(kept))  # needs no space on a full disk
    else:
        write_durably(path, kept.decode())
    return rows, last_seen
