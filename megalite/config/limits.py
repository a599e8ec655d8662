"""`megalite.train.limits` and `megalite.train.faults`: what a run does about parts that hang and steps that go wrong.

Next: sections.py, of which they are a part.
"""

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from megalite.config.section import Counter, Positive, Section

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Limits(Section):
    """How long each part of a run may take. A part that takes longer counts as stuck: each rank writes its stacks into
    the run folder's `faults/`, and all ranks end."""

    first_step_seconds: Seconds = Field(
        1800.0, description="The start of the engine, and the first step, each."
    )
    step_seconds: Seconds = Field(600.0, description="One later step.")
    checkpoint_seconds: Seconds = Field(
        1800.0, description="The time that a step waits for a checkpoint."
    )
    evaluation_seconds: Seconds = Field(1800.0, description="One evaluation.")

    @property
    def collective_timeout(self) -> timedelta:
        """After which torch itself ends a collective: later than all of them, since their report has more to tell."""
        longest = max(self.model_dump().values())
        return timedelta(seconds=longest + 300)


# Of programs without limits of their own.
DEFAULT_TIMEOUT = Limits.model_validate({}).collective_timeout


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
        description="A loss above this many times the median of the last spike_window losses is a spike; there is none "
        "if that median is 0.",
    )
    spike_window: Positive = Field(
        100, description="Losses in that median; there is no spike before there are as many."
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
        description="Steps between two comparisons of the time that each rank computes; the metrics of such a step "
        "also have `split_seconds`, the parts of its time; 0: never.",
    )
    slow_factor: float = Field(
        1.5,
        gt=1,
        description="A rank is slow if it computes longer than this many times the median of all ranks.",
    )
    slow_looks: Positive = Field(
        3, description="Comparisons in a row after which a slow rank is named."
    )
