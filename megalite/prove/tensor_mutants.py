"""Faults of the tensor axis: sums that are missing or computed twice. Next: mutants.py, which lists the faults."""

import contextlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

import megalite.parallel.collectives as collectives
import megalite.parallel.columns as columns_over
import megalite.parallel.loss as loss_over
from megalite.config import Config
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Axis
from megalite.programs.schedules import make_program
from megalite.prove.planting import put
from megalite.prove.trace import Plant, Session


def of_the_tensor_axis(config: Config) -> Iterable[tuple[str, Plant]]:
    """The faults that apply to a resolved config with several tensor ranks, by name."""
    if config.parallel.sequence:
        names = (("_GatherSequence", "backward"), ("_ScatterSequence", "forward"))
    else:
        names = (("_Enter", "backward"), ("_Leave", "forward"))
    for owner, method in names:
        yield f"collectives.{owner}.{method}: the sum is missing", _sums_of(owner, method, 0)
        yield f"collectives.{owner}.{method}: the sum is computed twice", _sums_of(owner, method, 2)
    parallel, count = config.parallel, config.accumulation_steps
    program = make_program(parallel.schedule, parallel.pipe, count, parallel.chunks_a_rank)
    if config.zero_stage != 3 and not program.splits_backward:
        yield "columns._begin_sum: the sum is missing", _sums_of_columns(0)
        yield "columns._begin_sum: the sum is computed twice", _sums_of_columns(2)
    yield "the loss does not sum over the vocabulary's parts", _loss_alone


_sum, _scatter = collectives.sum_over, collectives._scatter
_begin_sum = columns_over._begin_sum


def _sums_of(owner: str, method: str, times: int) -> Plant:
    """Changes the sum of one of the differentiable collectives. times: 0: each rank keeps its own part; 2: twice the
    sum."""

    def summed(tensor: Tensor, axis: Axis) -> Tensor:
        return _sum(tensor, axis).mul_(2) if times else tensor

    def scattered(whole: Tensor, axis: Axis) -> Tensor:
        if times:
            return _scatter(whole, axis) * 2
        return whole.unflatten(1, (axis.size, -1))[:, axis.rank].contiguous()

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        if event != "built":
            return
        target = getattr(collectives, owner)
        whole = target.__dict__[method].__func__

        def changed(ctx: Any, *arguments: Any) -> Any:
            with contextlib.ExitStack() as inner:
                put(inner, collectives, "sum_over", summed)
                put(inner, collectives, "_scatter", scattered)
                return whole(ctx, *arguments)

        put(stack, target, method, staticmethod(changed))

    return plant


def _sums_of_columns(times: int) -> Plant:
    """Changes the sum of the input's gradients in linears that share an input. times: as in _sums_of."""

    def begun(given: Tensor, split: Split) -> tuple[Tensor, Any]:
        if times:
            return _begin_sum(given * times, split)
        rows = split.rows(given.shape[1])
        return given[:, rows.start : rows.stop].contiguous(), None

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        if event == "built":
            put(stack, columns_over, "_begin_sum", begun)

    return plant


def _loss_alone(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if event == "built":
        put(stack, loss_over, "sum_over", lambda tensor, axis: tensor)
