"""The optimizer's parameter groups, and the learning rate of each step.

Next: engine/build.py, which passes both to DeepSpeed.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from megalite.config import Config, RateSchedule
from megalite.config.sections import ParameterGroup
from megalite.errors import ConfigError
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import EXPERTS, Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import Placement, placed

LR_RATIO = "lr_ratio"  # key of an optimizer's group: its learning rate, as a multiple of the run's


def entry_of(name: str, entries: Sequence[ParameterGroup]) -> int | None:
    """Index of the first entry of `megalite.train.parameter_groups` that matches a full name; None if none does."""
    return next((i for i, entry in enumerate(entries) if fnmatchcase(name, entry.match)), None)


def check_parameter_groups(config: Config, spec: TransformerSpec) -> None:
    """Raises ConfigError for an entry that applies to no tensor of the model."""
    entries = config.train.parameter_groups
    if not entries:
        return
    with torch.device("meta"):
        names = [place.name for _, place in placed(Stage(spec, Grid()))]
    taken = {entry_of(name, entries) for name in names}
    for i, entry in enumerate(entries):
        if i not in taken:
            seen = any(fnmatchcase(name, entry.match) for name in names)
            rule = f"matches no tensor, such as {names[-1]}"
            if seen:
                rule = "earlier entries match every tensor that it matches"
            raise ConfigError(f"megalite.train.parameter_groups.{i}.match: {entry.match!r}: {rule}")


def parameter_groups(
    stage: Any, weight_decay: float, entries: Sequence[ParameterGroup] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for the optimizer, each with one learning rate and one weight decay: those of `entries`, else
    weight decay for matrices only, not for norms and biases (one dim). Stages may have different groups, since each
    stage is a separate engine. Some tensors need a separate group:

    - a tied embedding, so that its ZeRO shards are the same on both stages with a copy, and tables on all stages;
    - tensors that the tensor axis cuts unevenly (an odd vocabulary). ZeRO flattens a group, and kernels round the last
      elements of a vector differently, so copies of a whole tensor would differ next to neighbours of unequal size;
    - tensors that the expert axis divides, which ZeRO shards over fewer ranks. DeepSpeed recognises these groups by
      `moe` and `name`.
    """

    def choice(place: Placement) -> tuple[float, float]:
        """(lr_ratio, weight_decay)"""
        usual = weight_decay if len(place.full_shape) > 1 else 0.0
        number = entry_of(place.name, entries)
        if number is None:
            return 1.0, usual
        decay = entries[number].weight_decay
        return entries[number].lr_ratio, usual if decay is None else decay

    groups: dict[tuple[float, float, tuple[bool, bool], bool, bool], dict[str, Any]] = {}
    ties = {id(value) for value, _ in stage.ties}
    for value, place in placed(stage):
        ratio, decay = choice(place)
        tied = id(value) in ties, value is stage.tied_parameter
        empty = {"params": [], "weight_decay": decay, LR_RATIO: ratio}
        if place.has_own_replicas:
            empty |= {"moe": True, "name": EXPERTS}
        key = ratio, decay, tied, place.uneven, place.has_own_replicas
        groups.setdefault(key, empty)["params"].append(value)
    return list(groups.values())


def learning_rate_factor(
    schedule: RateSchedule, step: int, consumed_tokens: int = 0, step_tokens: int = 0
) -> float:
    """The factor of `lr` for optimizer step `step` (0 is the first), which takes `step_tokens` after `consumed_tokens`:
    a linear warm-up whose first value is above 0, then the schedule's curve."""
    if schedule.warmup_tokens is not None:
        if consumed_tokens < schedule.warmup_tokens:
            return min(1.0, (consumed_tokens + step_tokens) / schedule.warmup_tokens)
    elif step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    past = max(0, step - schedule.warmup_steps)
    match schedule.type:
        case "linear" | "cosine":
            fall_steps = max(1, schedule.total_steps - schedule.warmup_steps)
            shape = _fall(schedule.type, past / fall_steps)
        case "wsd":
            decayed = step - (schedule.total_steps - schedule.decay_steps)
            shape = _fall(schedule.decay_shape, decayed / schedule.decay_steps)
        case "inverse_sqrt":
            timescale = schedule.timescale_steps
            return max(schedule.min_ratio, math.sqrt(timescale / (timescale + past)))
        case _:
            return 1.0
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * shape


def _fall(shape: str, done: float) -> float:
    """The decay curve, from 1 to 0 as `done` goes from 0 to 1."""
    done = min(1.0, max(0.0, done))
    match shape:
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            return 1.0 - math.sqrt(done)
