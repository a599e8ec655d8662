"""The types of `scheduler` and their parameters: megalite's five and DeepSpeed's five.

The keys of DeepSpeed's types are the arguments of its constructors (`deepspeed/runtime/lr_schedules.py`);
a field without a default here takes DeepSpeed's. Only the parameters are here; the curves of megalite's
types are in `megalite/model/parameter_groups.py`.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from megalite.config.section import Positive, Rate, Section, key


class Constant(Section):
    """`constant`"""

    warmup_steps: int = Field(
        0, ge=0, description="Steps of linear warm-up to `lr`; the first step's rate is above 0."
    )
    warmup_tokens: Positive | None = key(
        "In place of warmup_steps: tokens of linear warm-up, whatever the tokens per step."
    )


class Linear(Constant):
    """`linear`: from `lr` down to `lr × min_ratio` linearly."""

    total_steps: Positive | None = key(
        "Step at which the lowest rate is reached; left out: megalite.train.steps."
    )
    min_ratio: float = Field(0.0, ge=0, le=1, description="Lowest rate, as a share of `lr`.")


class Cosine(Linear):
    """`cosine`: from `lr` down to `lr × min_ratio` along half a cosine."""


class WSD(Linear):
    """`wsd` (warm-up, stable, decay; arXiv 2404.06395): `lr` until the decay, which ends at total_steps."""

    decay_steps: Positive | None = key("Steps of the decay.")
    decay_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="In place of decay_steps: a share of total_steps; both left out: 0.1.",
    )
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = Field(
        "1-sqrt", description="Form of the decay; `1-sqrt` as in arXiv 2405.18392, section 3."
    )


class InverseSqrt(Constant):
    """`inverse_sqrt`: `lr × sqrt(T / (T + steps since the warm-up))`; as in arXiv 1706.03762 if T is the warm-up."""

    timescale_steps: Positive | None = key("T; left out: the warm-up in steps.")
    min_ratio: float = Field(0.0, ge=0, le=1, description="Lowest rate, as a share of `lr`.")


class WarmupLR(Section):
    """`WarmupLR`"""

    warmup_min_lr: Rate | None = key("Rate at the start.")
    warmup_max_lr: Rate | None = key("Rate after the warm-up; left out: optimizer.params.lr.")
    warmup_num_steps: Positive | None = key("Steps of warm-up.")
    warmup_type: Literal["log", "linear"] | None = key("Form of the rise.")


class WarmupDecayLR(WarmupLR):
    """`WarmupDecayLR`"""

    total_num_steps: Positive | None = key(
        "Step at which 0 is reached; left out: megalite.train.steps."
    )


class WarmupCosineLR(Section):
    """`WarmupCosineLR`"""

    total_num_steps: Positive | None = key(
        "Step of the lowest rate; left out: megalite.train.steps."
    )
    warmup_min_ratio: float | None = Field(
        None, ge=0, le=1, description="Rate at the start, as a share of `lr`."
    )
    warmup_num_steps: Positive | None = key("Steps of warm-up.")
    cos_min_ratio: float | None = Field(
        None, ge=0, le=1, description="Lowest rate, as a share of `lr`."
    )
    warmup_type: Literal["log", "linear"] | None = key("Form of the rise.")


class OneCycle(Section):
    """`OneCycle`"""

    cycle_min_lr: Rate = Field(description="Lowest rate of the cycle.")
    cycle_max_lr: Rate = Field(description="Highest rate of the cycle.")
    decay_lr_rate: Rate | None = key("Decay of the rate after the cycle.")
    cycle_first_step_size: Positive | None = key("Steps of the rise.")
    cycle_second_step_size: Positive | None = key("Steps of the fall.")
    cycle_first_stair_count: int | None = Field(None, ge=0, description="Stairs of the rise.")
    cycle_second_stair_count: int | None = Field(None, ge=0, description="Stairs of the fall.")
    decay_step_size: int | None = Field(None, ge=0, description="Steps of a decay; 0: no decay.")
    cycle_momentum: bool | None = key("Move the first of `betas` against the rate.")
    cycle_min_mom: Rate | None = key("Lowest momentum.")
    cycle_max_mom: Rate | None = key("Highest momentum.")
    decay_mom_rate: Rate | None = key("Decay of the momentum after the cycle.")


class LRRangeTest(Section):
    """`LRRangeTest`"""

    lr_range_test_min_lr: Rate | None = key("Rate at the start.")
    lr_range_test_step_size: Positive | None = key("Steps between two rises.")
    lr_range_test_step_rate: Rate | None = key("Size of a rise.")
    lr_range_test_staircase: bool | None = key("Rise in stairs.")


OURS: dict[str, type[Section]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "wsd": WSD,
    "inverse_sqrt": InverseSqrt,
}
DEEPSPEEDS: dict[str, type[Section]] = {
    section.__name__: section
    for section in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}
SCHEDULES = OURS | DEEPSPEEDS


@dataclass(frozen=True)
class RateSchedule:
    """A schedule that megalite runs itself: `lr` times a factor of the position (model/parameter_groups.py)."""

    type: str
    total_steps: int
    """Step at which the decay ends."""
    warmup_steps: int = 0
    """Steps of linear warm-up; if it is given in tokens, the steps that they take."""
    warmup_tokens: int | None = None
    min_ratio: float = 1.0
    """Lowest factor."""
    decay_steps: int = 0
    """`wsd`: the last steps before total_steps."""
    decay_shape: str = "linear"
    timescale_steps: int = 1
    """`inverse_sqrt`: T."""
