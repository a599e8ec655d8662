"""`megalite.train.limits` and `megalite.train.faults`: what a run does about parts that hang and steps that go wrong.

Next: sections.py, of which they are a part.
"""

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from megalite.config.section import Counter, Positive, Section

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Limits(Section):
    """How long each part of a run may take. One that takes longer is taken for stuck: each rank writes its stacks into
    the run folder's `faults/`, and all end."""

    first_step_seconds: Seconds = Field(
        1800.0, description="The engine's start, and as much again for the first step."
    )
    step_seconds: Seconds = Field(600.0, description="One later step.")
    checkpoint_seconds: Seconds = Field(1800.0, description="What a step waits for a checkpoint.")
    evaluation_seconds: Seconds = Field(1800.0, description="One evaluation.")

    @property
    def collective_timeout(self) -> timedelta:
        """After which torch itself ends a collective: later than all of them, since their report has more to tell."""
        longest = max(
            self.first_step_seconds,
            self.step_seconds,
            self.checkpoint_seconds,
            self.evaluation_seconds,
        )
        return timedelta(seconds=longest + 300)


DEFAULT_TIMEOUT = Limits.model_validate(
    {}
).collective_timeout  # of programs without limits of their own


class Faults(Section):
    """What a run does about a step that went wrong, and what it looks for. Each is judged before the step's update, the
    same on every rank. A skipped step counts in `step`, `consumed_samples` and the learning rate's schedule; its row
    says `skipped`."""

    not_finite: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="A loss or gradient that is not finite. `stop` ends the run with 1; `skip` leaves the update out; "
        "`rewind` goes back to the newest good checkpoint and leaves that batch out for good. fp16's overflows, which "
        "a smaller loss scale cures, are always skipped.",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="A loss above this many times the median of the last spike_window losses is a spike; none is where "
        "that median is 0.",
    )
    spike_window: Positive = Field(
        100, description="Losses that the median is of; none is a spike before there are as many."
    )
    spike: Literal["warn", "skip", "rewind"] = Field(
        "warn", description="What is done about a spike: a line in the log, or as in not_finite."
    )
    most_in_a_row: Positive = Field(
        10,
        description="After so many skips or rewinds with no step past them, the next one stops the run.",
    )
    replica_check_interval: Counter = Field(
        100,
        description="Steps between two comparisons of all copies of each weight, by a hash: over the data axis, over "
        "the tensor axis, and of tied embeddings; 0: never. A rank that differs is named and the run ends with 1.",
    )
    pace_interval: Counter = Field(
        10,
        description="Steps between two comparisons of the ranks' own seconds of computing, whose rows also have "
        "`split_seconds`, where the step's time went; 0: never.",
    )
    slow_factor: float = Field(
        1.5,
        gt=1,
        description="A rank is slow that computes longer than the median of all by this factor.",
    )
    slow_looks: Positive = Field(
        3, description="Comparisons in a row after which a slow rank is named."
    )
