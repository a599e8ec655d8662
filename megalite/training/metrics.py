"""`metrics.jsonl`: one object a line, floats with all their digits; TensorBoard's events from the same rows.

A resumed run first removes rows after its checkpoint's step and a torn last line, so that no step stands twice.
"""

import json
import os
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class MetricsFile:
    """Appends rows to a run's metrics. Made by one rank only."""

    def __init__(self, run_dir: Path, first_step: int, tensorboard: bool) -> None:
        self.path = run_dir / FILE
        _keep_until(self.path, first_step)
        self.file = self.path.open("a", encoding="utf-8")
        self.events: Any = _event_writer(run_dir, first_step) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row; it is on its way to the disk when this returns."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self.events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()


def _keep_until(path: Path, step: int) -> None:
    """Rewrites the file with the rows up to `step`, whole lines only, by one rename."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text("".join(kept), encoding="utf-8")
    os.replace(beside, path)


def _event_writer(run_dir: Path, first_step: int) -> Any:
    # Imported here because it takes longer than the rest of the start.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None)
