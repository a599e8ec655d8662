"""Faults of a kind of parameter: its gradient, its share of the norm, its weight decay, its shards.

A kind is a name without the layer's number. Next: mutants.py, which lists the faults.
"""

import contextlib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megalite.config import Config
from megalite.engine.norm import GlobalNorm
from megalite.model.families import read_spec
from megalite.model.parameter_groups import parameter_groups
from megalite.model.transformer import Stage
from megalite.parallel.grid import Axis, Grid
from megalite.parallel.layers import placed
from megalite.prove.trace import Plant, Session


def kind_of(name: str) -> str:
    """`layers.3.mlp.up.weight` -> `layers.*.mlp.up.weight`"""
    return re.sub(r"\.\d+\.", ".*.", name)


def of_parameters(config: Config, grid: Grid) -> Iterable[tuple[str, Plant]]:
    """The faults of each kind of parameter of a layout's resolved config, by name."""
    for kind, is_decayed in _kinds(config).items():
        if grid.data.size > 1:
            yield f"{kind}: gradient of the last data rank is lost", _gradient(kind, "data", 0.0)
        if grid.context.size > 1:
            plant = _gradient(kind, "context", 0.0)
            yield f"{kind}: gradient of the last context rank is lost", plant
        if grid.tensor.size > 1:
            plant = _gradient(kind, "tensor", 2.0)
            yield f"{kind}: gradient of the last tensor rank is doubled", plant
        yield f"{kind}: counted twice in the norm", _norm_weighs(kind, 2.0)
        yield f"{kind}: left out of the norm", _norm_weighs(kind, 0.0)
        if is_decayed:
            yield f"{kind}: weight decay dropped", _no_decay(kind)
        yield f"{kind}: shard shifted by one at the start", _shifted(kind, "built", "weight")
        yield f"{kind}: shard shifted by one on resuming", _shifted(kind, "resumed", "weight")
        plant = _shifted(kind, "resumed", "exp_avg")
        yield f"{kind}: first moment shifted by one on resuming", plant


def _kinds(config: Config) -> dict[str, bool]:
    """The kinds of the model's parameters, and whether weight decay applies to each."""
    with torch.device("meta"):
        stage = Stage(read_spec(config.model), Grid())
    optimizer = config.document.optimizer
    decay = 0.0 if optimizer is None else optimizer.params.weight_decay
    groups = parameter_groups(stage, decay, config.train.parameter_groups)
    decayed = {id(value) for group in groups if group["weight_decay"] for value in group["params"]}
    return {kind_of(placement.name): id(value) in decayed for value, placement in placed(stage)}


def _gradient(kind: str, axis: str, factor: float) -> Plant:
    """Multiplies the gradients on the last rank of the axis."""

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        found: Axis = getattr(session.engine.grid, axis)
        if not found.is_last:
            return
        for value, placement in placed(session.engine.stage):
            if kind_of(placement.name) == kind:
                value.register_hook(lambda gradient: gradient * factor)

    return plant


class _Weighing(GlobalNorm):
    """Counts the squares of one kind `times` times."""

    kind: str
    times: float

    def __call__(self, pieces: Any, device: torch.device, replicated: bool) -> Tensor:
        def weighed() -> Any:
            for placement, gradient in pieces:
                if kind_of(placement.name) == self.kind:
                    gradient = gradient * self.times**0.5
                yield placement, gradient

        return super().__call__(weighed(), device, replicated)


def _norm_weighs(kind: str, times: float) -> Plant:
    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        norm: Any = session.engine.global_norm
        norm.__class__, norm.kind, norm.times = _Weighing, kind, times

    return plant


def _no_decay(kind: str) -> Plant:
    """Undoes the weight decay after each update."""

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        step, engine = session.engine.step, session.engine

        def undecayed(lr_kwargs: Any = None) -> None:
            groups: Any = engine.basic_optimizer.param_groups  # type: ignore[union-attr]
            rate = groups[0]["lr"]
            decay = max(group["weight_decay"] for group in groups)
            before = {shard.placement.name: shard.master.clone() for shard in engine.shards()}
            step(lr_kwargs)
            for shard in engine.shards():
                name = shard.placement.name
                if kind_of(name) == kind:
                    shard.master.add_(before[name], alpha=rate * decay)
            engine.masters_changed()

        engine.step = undecayed  # type: ignore[method-assign]

    return plant


def _shifted(kind: str, at: str, part: str) -> Plant:
    """Shifts the elements of the last rank's shards by one. part: `weight`, or a moment's name."""

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        if event != at:
            return
        grid = session.engine.grid
        if grid.replica.is_last and grid.tensor.is_last:
            for shard in session.engine.shards():
                if kind_of(shard.placement.name) == kind:
                    values = shard.master if part == "weight" else shard.state[part]
                    values.copy_(values.roll(1))
        session.engine.masters_changed()

    return plant
