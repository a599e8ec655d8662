"""Which parameters the optimizer treats alike, and the learning rate of a step.

Next: engine.py, which gives both to DeepSpeed.
"""

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from megalite.config import Config, Schedule
from megalite.config.sections import ParameterGroup
from megalite.errors import ConfigError
from megalite.model.spec import TransformerSpec
from megalite.model.transformer import EXPERTS, Stage
from megalite.parallel.grid import Grid
from megalite.parallel.layers import Placement, placed

LR_RATIO = "lr_ratio"  # of an optimizer's group: its learning rate, as a multiple of the run's


def entry_of(name: str, entries: Sequence[ParameterGroup]) -> int | None:
    """Number of the first of `megalite.train.parameter_groups` that matches a full name."""
    return next((i for i, entry in enumerate(entries) if fnmatchcase(name, entry.match)), None)


def check_parameter_groups(config: Config, spec: TransformerSpec) -> None:
    """ConfigError for an entry that no tensor of the model falls to."""
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
                rule = "earlier entries take all that it matches"
            raise ConfigError(f"megalite.train.parameter_groups.{i}.match: {entry.match!r}: {rule}")


def parameter_groups(
    stage: Any, weight_decay: float, entries: Sequence[ParameterGroup] = ()
) -> list[dict[str, Any]]:
    """Groups for the optimizer, alike in learning rate and weight decay: by `entries`, else matrices decay, and norms
    and biases (one dim) do not. A tied embedding's copy has a group of its own, so that its ZeRO shards are the same on
    both stages that hold one; so have tables that all stages hold. So have tensors that the tensor axis cuts unevenly
    (an odd vocabulary): ZeRO lays a group out flat, and kernels round the last numbers of a stretch in another way, so
    that copies of what is whole would differ where what is next to them does. And what an expert axis divides, which
    ZeRO shards over fewer ranks; DeepSpeed knows those groups by `moe` and `name`. Stages may differ in their groups:
    each is an engine of its own.
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
    schedule: Schedule, step: int, consumed_tokens: int = 0, step_tokens: int = 0
) -> float:
    """What `lr` is multiplied with for optimizer step `step` (0 is the first), which takes `step_tokens` after
    `consumed_tokens`: a linear rise whose first value is above 0, then the schedule's own form."""
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
    """From 1 to 0 as `done` goes from 0 to 1."""
    done = min(1.0, max(0.0, done))
    match shape:
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            return 1.0 - math.sqrt(done)
