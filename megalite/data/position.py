"""The position of a run, as a value: what state.json holds beside weights and moments, and a run resumes from.

Next: loop.py, which moves it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from megalite.data.best import Best


@dataclass(frozen=True)
class Position:
    """Optimizer steps done, samples and tokens seen; of the steps, those whose update was skipped.

    left_out: half-open ranges of the corpus order that no step takes, in order and apart: batches that a run went back
    from. recent_losses: what a spike is measured by. loss_scale: of fp16's dynamic scaler. best: of the evaluations.
    owes_evaluation: the evaluation after this step is still to be made: a signal came first. faults_in_a_row: skips and
    rewinds with no step past them, the last of them at faulty_step (guard/health.py).
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    left_out: tuple[tuple[int, int], ...] = ()
    recent_losses: tuple[float, ...] = ()
    loss_scale: dict[str, Any] | None = None
    best: Best = Best()
    owes_evaluation: bool = False
    faults_in_a_row: int = 0
    faulty_step: int = 0

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Position":
        """From a checkpoint's state, which holds more; what an older one lacks is as in a run without faults."""
        values = {field.name: state[field.name] for field in fields(cls) if field.name in state}
        values["left_out"] = tuple((start, stop) for start, stop in values.get("left_out", ()))
        values["recent_losses"] = tuple(values.get("recent_losses", ()))
        values["best"] = Best(**values.get("best", {}))
        return cls(**values)

    @property
    def updates(self) -> int:
        """Updates that happened: what Adam counts."""
        return self.step - self.skipped_steps

    def after(self, samples: int, tokens: int, skipped: bool = False) -> "Position":
        """One step later."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_steps=self.skipped_steps + skipped,
            owes_evaluation=False,
        )

    def place(self, sample: int) -> int:
        """The place in the corpus order of the run's sample of that number: those left out are passed over."""
        for start, stop in self.left_out:
            if sample >= start:
                sample += stop - start
        return sample

    def leaving_out(self, samples: range) -> "Position":
        """The same with these samples of the run, counted as now, left out from here on."""
        start, stop = self.place(samples.start), self.place(samples.stop - 1) + 1
        kept = [(a, b) for a, b in self.left_out if b < start or a > stop]
        for a, b in set(self.left_out) - set(kept):
            start, stop = min(a, start), max(b, stop)
        return replace(self, left_out=tuple(sorted([*kept, (start, stop)])))


class Kept:
    """Samples by their number in the run, where `position` says which are left out."""

    def __init__(self, samples: Any, position: Position) -> None:
        self.samples, self.position = samples, position

    def batch(self, positions: Sequence[int]) -> Any:
        """As of the samples themselves."""
        return self.samples.batch([self.position.place(position) for position in positions])
