"""A run's record of its evaluations: the lowest validation loss, and the number of evaluations since then.

It is part of the position (position.py), so that a resumed run decides as if it had never been stopped.
"""

import math
from dataclasses import dataclass, replace

from megalite.config.sections import EarlyStop


@dataclass(frozen=True)
class Best:
    """loss, step: those of the evaluation with the lowest loss, None before the first; bar: the loss that a later one
    must be below by `min_delta` (smaller gains do not move it, so that they add up); waited: evaluations since the bar
    last moved."""

    loss: float | None = None
    step: int | None = None
    bar: float | None = None
    waited: int = 0

    def after(self, loss: float, step: int, min_delta: float = 0.0) -> "Best":
        """The record including the evaluation after `step`. A loss that is not finite is not a gain."""
        best = self
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            best = replace(self, loss=loss, step=step)
        if math.isfinite(loss) and (self.bar is None or loss < self.bar - min_delta):
            return replace(best, bar=loss, waited=0)
        return replace(best, waited=self.waited + 1)

    def is_stopped(self, early_stop: EarlyStop | None) -> bool:
        """Whether the run stops early here."""
        return early_stop is not None and self.waited >= early_stop.patience

    @property
    def stop_line(self) -> str:
        """The line that says why the run stops early."""
        evaluations = "1 evaluation" if self.waited == 1 else f"{self.waited} evaluations"
        if self.loss is None:
            return f"stopped early: no finite validation loss in {evaluations}"
        best = f"best {self.loss:.4f} at step {self.step}"
        return f"stopped early: no lower validation loss in {evaluations}; {best}"
