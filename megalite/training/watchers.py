"""Watchers are callbacks of a run: guards, figures of checkpoints, metrics, the screen, a history, trackers, traces.

The loop (loop.py) uses watchers only through these methods. A new one is a file with a subclass and a line in
`watchers_of` (watching.py). Watchers with collectives are on every rank, in the same order; others may be on rank 0
only. Next: guards.py, watching.py.
"""

from typing import Any

from megalite.data.position import Position

Row = dict[str, Any]
"""A row of metrics.jsonl."""


class Watcher:
    """Base class, whose methods do nothing. They are called in the order below."""

    def before_step(self, position: Position) -> None:
        """Called before a step from `position`."""

    def after_step(self, row: Row) -> None:
        """Called after a step. row: its metrics; later watchers see the fields that this one adds. May raise
        TrainingError, on all ranks."""

    def evaluated(self, row: Row) -> None:
        """Called after an evaluation. row: its losses."""

    def saved(self, position: Position) -> None:
        """Called when a save has started; the checkpoint is complete when `after_step` sees
        `checkpoint_write_seconds`."""

    def rewound(self, position: Position) -> None:
        """Called when the run has rewound to an earlier step."""

    def logged(self, text: str) -> None:
        """Called with a line for the log, on every rank that has one."""

    def ended(self, position: Position, reason: str) -> None:
        """Called when the last step is done or the run was stopped. reason: `done`, `stopped early`, or the signal or
        error."""

    def close(self) -> None:
        """Called at the end, also after errors. Must not raise and must not run a collective."""
