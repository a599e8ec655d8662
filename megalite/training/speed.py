"""Seconds, tokens per second and MFU of each step."""

import time

from megalite.data.position import Position
from megalite.training.mfu import Utilisation
from megalite.training.watchers import Row, Watcher


class Speed(Watcher):
    """Measures each step. The time of watchers before this one in the list is included, that of later ones is not."""

    def __init__(self, utilisation: Utilisation) -> None:
        self.utilisation = utilisation
        self.start, self.tokens = 0.0, 0

    def before_step(self, position: Position) -> None:
        """Starts the clock."""
        self.start, self.tokens = time.perf_counter(), position.consumed_tokens

    def after_step(self, row: Row) -> None:
        """Adds the step's seconds, tokens per second and MFU."""
        seconds = time.perf_counter() - self.start
        rate = (row["consumed_tokens"] - self.tokens) / seconds
        row |= {"step_seconds": seconds, "tokens_per_second": rate, **self.utilisation.row(rate)}
