"""`megalite.train.limits` and `megalite.train.faults`: how a run handles operations that hang and steps that go wrong.

Next: sections.py, which includes them.
"""

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from megalite.config.section import Counter, Positive, Section

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Limits(Section):
    """Time limits for the parts of a run. A part that takes longer counts as hung: each rank writes its stack traces to
    the run folder's `faults/`, and all ranks end."""

    first_step_seconds: Seconds = Field(
        1800.0, description="For the start of the engine, and again for the first step."
    )
    step_seconds: Seconds = Field(600.0, description="For each later step.")
    checkpoint_seconds: Seconds = Field(
        1800.0, description="For the time that a step waits for a checkpoint."
    )
    evaluation_seconds: Seconds = Field(1800.0, description="For each evaluation.")

    @property
    def collective_timeout(self) -> timedelta:
        """torch's timeout for collectives: above all limits, since the report of a limit says more than torch's."""
        longest = max(self.model_dump().values())
        return timedelta(seconds=longest + 300)


# For programs without limits in their config.
DEFAULT_TIMEOUT = Limits.model_validate({}).collective_timeout


class Faults(Section):
    """The faults that a run looks for, and what it does about them. Each step is judged before its update, the same on
    every rank. A skipped step counts in `step`, `consumed_samples` and the learning-rate schedule; its row has
    `skipped`."""

    not_finite: Literal["stop", "skip", "rewind"] = Field(
        "stop",
        description="For a loss or gradient that is not finite. `stop` ends the run with exit code 1; `skip` skips the "
        "update; `rewind` reloads the newest good checkpoint and leaves out that batch from then on. fp16 overflows, "
        "which a smaller loss scale avoids, are always skipped.",
    )
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="A loss above this factor times the median of the last spike_window losses is a spike, unless "
        "that median is 0.",
    )
    spike_window: Positive = Field(
        100, description="Losses in that median; no spike is detected before there are as many."
    )
    spike: Literal["warn", "skip", "rewind"] = Field(
        "warn",
        description="For a spike. `warn` logs a line; `skip` and `rewind` are as in not_finite.",
    )
    most_in_a_row: Positive = Field(
        10,
        description="After this many consecutive skips or rewinds without progress, the next one stops the run.",
    )
    replica_check_interval: Counter = Field(
        100,
        description="Steps between two comparisons of all copies of each weight by their hashes: over the data axis, "
        "over the tensor axis, and of tied embeddings; 0: never. If a rank differs, the run names it and ends with "
        "exit code 1.",
    )
    pace_interval: Counter = Field(
        10,
        description="Steps between two comparisons of all ranks' compute times; the metrics of such a step also have "
        "`split_seconds`, the parts of its time; 0: never.",
    )
    slow_factor: float = Field(
        1.5,
        gt=1,
        description="A rank is slow if its compute time is above this factor times the median of all ranks.",
    )
    slow_looks: Positive = Field(
        3, description="A rank is reported if it is slow in this many consecutive comparisons."
    )
