"""What follows a run beside its steps: guards, checkpoints' figures, metrics, the screen, a history, trackers, traces.

The loop (loop.py) knows watchers only by these methods. A new one is a file with a subclass and a line in `watchers_of`
(watching.py). Every rank has the same kinds in the same order, so that a method may hold a collective; what only rank 0
does is in a watcher that is idle on the others. Next: guards.py, watching.py.
"""

from typing import Any

from megalite.data.position import Position

Row = dict[str, Any]
"""A row of metrics.jsonl."""


class Watcher:
    """Does nothing, at every point of a run where something can be done. Methods are called in the order below."""

    def before_step(self, position: Position) -> None:
        """Before a step from that position."""

    def after_step(self, row: Row) -> None:
        """After it. row: what is known of the step; later watchers see the fields that this one adds. May raise
        TrainingError, on all ranks."""

    def evaluated(self, row: Row) -> None:
        """After an evaluation; row: of its losses."""

    def saved(self, position: Position) -> None:
        """A checkpoint of that position was begun; it is whole when `after_step` sees `checkpoint_write_seconds`."""

    def went_back(self, position: Position) -> None:
        """The run has returned to an earlier step."""

    def note(self, text: str) -> None:
        """A line for whoever reads the log; called on rank 0 with what is worth one, on other ranks too with what they
        would say."""

    def ended(self, position: Position, reason: str) -> None:
        """The last step is done or the run was stopped; reason: `done`, `stopped early`, or of the
        signal or error."""

    def close(self) -> None:
        """The end, after errors too. Must not raise and must not hold a collective."""
