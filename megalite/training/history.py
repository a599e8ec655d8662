"""history.jsonl: when a run started, saved, rewound and ended; and the report that a run writes. Rank 0 only.

A killed start has no end: `last_seen` of the next start tells when its last row was written.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megalite.checkpoint.appended import Appended
from megalite.checkpoint.folder import write_durably
from megalite.data.loader import TrainData
from megalite.data.position import Position
from megalite.report.read import ABOUT, HISTORY, REPORT
from megalite.report.report_program import write_report
from megalite.training.watchers import Watcher

Tell = Callable[[str], None]


class History(Watcher):
    """Appends events, one JSON object per line with `event`, `unix_seconds` and `step`."""

    def __init__(self, run_dir: Path, data: TrainData, tell: Tell) -> None:
        self.file, self.data = Appended(run_dir / HISTORY, tell), data

    def started(self, position: Position, grid: str, last_seen: float) -> None:
        """Records a start from `position`. grid: as text. last_seen: unix time of the last row of the previous
        start."""
        self._append("start", position, grid=grid, last_seen=last_seen)

    def saved(self, position: Position) -> None:
        """Records the start of a save."""
        self._append("checkpoint", position, corpora=self._corpora(position))

    def went_back(self, position: Position) -> None:
        """Records that the run has rewound to an earlier step."""
        self._append("back", position)

    def ended(self, position: Position, reason: str) -> None:
        """Records the end, with the samples read from each corpus."""
        self._append("end", position, reason=reason, corpora=self._corpora(position))

    def close(self) -> None:
        """Writes pending rows."""
        self.file.close()

    def _corpora(self, position: Position) -> list[dict[str, Any]]:
        shares = self.data.shares(position.consumed_samples)
        return [
            {"path": share.path, "asked": float(share.asked), "samples": int(share.samples)}
            for share in shares
        ]

    def _append(self, event: str, position: Position, **fields: Any) -> None:
        row = {"event": event, "unix_seconds": time.time(), "step": position.step} | fields
        self.file.append(f"{json.dumps(row)}\n".encode())


class ReportWriter(Watcher):
    """Writes report.html when the run ends, also after a signal or an error. about: facts of the run (about.py)."""

    def __init__(self, run_dir: Path, about: Mapping[str, Any], tell: Tell) -> None:
        self.run_dir, self.tell = run_dir, tell
        try:
            write_durably(run_dir / ABOUT, json.dumps(about) + "\n")
        except OSError as error:
            tell(f"{run_dir / ABOUT}: cannot be written: {error.strerror}; the run continues")

    def close(self) -> None:
        """Writes the page, after the other files are closed. An error here must not change how a run ends."""
        path = self.run_dir / REPORT
        try:
            write_report([self.run_dir], path)
        except Exception as error:
            self.tell(f"{path}: cannot be written: {type(error).__name__}: {error}")
