"""The position of a run, as a value: a checkpoint's state.json contains it, and a run resumes from it.

Next: loop.py, which advances it.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from megalite.data.best import Best


@dataclass(frozen=True)
class Position:
    """Optimizer steps done, samples and tokens consumed, and the number of steps whose update was skipped.

    left_out: half-open ranges of the corpus order that no step takes, sorted and disjoint: batches that the run left
    out when it rewound. recent_losses: the losses that a spike is compared with. loss_scale: state of fp16's dynamic
    loss scaler. best: record of the evaluations. owes_evaluation: whether the evaluation after this step is still to be
    done, because a signal came first. faults_in_a_row: consecutive skips and rewinds without progress, the last of them
    at faulty_step (guard/health.py).
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
        """The position in a checkpoint's state, which contains more; values that an older checkpoint lacks get their
        defaults."""
        values = {field.name: state[field.name] for field in fields(cls) if field.name in state}
        values["left_out"] = tuple((start, stop) for start, stop in values.get("left_out", ()))
        values["recent_losses"] = tuple(values.get("recent_losses", ()))
        values["best"] = Best(**values.get("best", {}))
        return cls(**values)

    @property
    def updates(self) -> int:
        """Number of updates that were not skipped, as counted by Adam."""
        return self.step - self.skipped_steps

    def after(self, samples: int, tokens: int, skipped: bool = False) -> "Position":
        """The position one step later."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_steps=self.skipped_steps + skipped,
            owes_evaluation=False,
        )

    def place(self, sample: int) -> int:
        """The position in the corpus order of the run's sample number `sample`: samples left out are passed over."""
        for start, stop in self.left_out:
            if sample >= start:
                sample += stop - start
        return sample

    def leaving_out(self, samples: range) -> "Position":
        """The same position, with these samples of the run (by their current numbers) left out from now on."""
        start, stop = self.place(samples.start), self.place(samples.stop - 1) + 1
        kept = [(a, b) for a, b in self.left_out if b < start or a > stop]
        for a, b in set(self.left_out) - set(kept):
            start, stop = min(a, start), max(b, stop)
        return replace(self, left_out=tuple(sorted([*kept, (start, stop)])))
