"""Which parameters the optimizer treats alike, and the learning rate of a step.

Next: engine.py, which gives both to DeepSpeed.
"""

import math
from typing import Any

from torch import nn

from megalite.config import Schedule


def parameter_groups(stage: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for the optimizer: matrices decay; norms and biases (one dim) do not. A tied embedding's copy has a
    group of its own, so that its ZeRO shards are the same on both stages that hold one."""
    tied: nn.Parameter | None = stage.tied_parameter
    rest = [value for value in stage.parameters() if value is not tied]
    groups = [
        {"params": [v for v in rest if v.placement and len(v.placement.full_shape) > 1], "weight_decay": weight_decay},
        {"params": [v for v in rest if len(v.placement.full_shape) == 1], "weight_decay": 0.0},
        {"params": [tied] if tied is not None else [], "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def learning_rate_factor(schedule: Schedule, step: int) -> float:
    """What `lr` is multiplied with for optimizer step `step` (0 is the first): a linear rise whose first value is
    above 0, then the schedule's own form down to `min_ratio`."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    span = max(1, schedule.total_steps - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / span)
    match schedule.type:
        case "linear":
            shape = 1.0 - done
        case "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            return 1.0
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * shape
