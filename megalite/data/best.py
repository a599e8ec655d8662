"""What a run remembers of its evaluations: the lowest validation loss, and how long there was no lower one.

It is a part of the position (position.py), so that a resumed run decides as one that was never stopped.
"""

import math
from dataclasses import dataclass, replace

from megalite.config.sections import EarlyStop


@dataclass(frozen=True)
class Best:
    """loss, step: of the evaluation with the lowest loss, None before the first; bar: a later loss must
    be below it by `min_delta`; smaller gains leave it where it is, so that they add up; waited: evaluations since."""

    loss: float | None = None
    step: int | None = None
    bar: float | None = None
    waited: int = 0

    def after(self, loss: float, step: int, min_delta: float = 0.0) -> "Best":
        """With the evaluation after that step. A loss that is not finite is no gain."""
        best = self
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            best = replace(self, loss=loss, step=step)
        if math.isfinite(loss) and (self.bar is None or loss < self.bar - min_delta):
            return replace(best, bar=loss, waited=0)
        return replace(best, waited=self.waited + 1)

    def is_stopped(self, early_stop: EarlyStop | None) -> bool:
        """Whether a run ends here."""
        return early_stop is not None and self.waited >= early_stop.patience

    @property
    def stop_line(self) -> str:
        """Why it does."""
        evaluations = "1 evaluation" if self.waited == 1 else f"{self.waited} evaluations"
        if self.loss is None:
            return f"stopped early: no finite validation loss in {evaluations}"
        best = f"best {self.loss:.4f} at step {self.step}"
        return f"stopped early: no lower validation loss in {evaluations}; {best}"
