"""Faults of a step on any layout: the loss's scale, a rank's samples, the norm used for clipping, dropout's randomness.
Next: mutants.py, which lists the faults.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import megalite.engine.norm as norm_over
from megalite.config import Config
from megalite.engine.norm import GlobalNorm
from megalite.model.families import read_spec
from megalite.parallel.grid import Grid
from megalite.parallel.loss import IGNORED
from megalite.prove.planting import change_forward, put
from megalite.prove.trace import Plant, Session


def of_the_step(config: Config, grid: Grid) -> Iterable[tuple[str, Plant]]:
    """The faults that apply to a layout's resolved config, by name."""
    yield "the loss is a mean of the ranks' own means", _own_mean
    yield "gradients are divided twice by the number of micro-batches", _divided_again
    yield "the last micro-batch counts twice in backward", _last_micro_batch(2.0)
    yield "the last micro-batch is lost in backward", _last_micro_batch(0.0)
    yield "the evaluation's loss is halved", _halved_evaluation
    if grid.data.size > 1:
        yield "the last data rank computes the first one's samples", _others_samples
    if config.world_size > 1:
        yield "each rank clips by its own norm", _own_norm
    if read_spec(config.model).dropout > 0:
        yield "dropout of the last ranks is that of step 0", _old_randomness


def _divided_again(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    whole = session.pipeline.train_step

    def divided(batches: Any, scale: Any, before_update: Any = None) -> Tensor:
        return whole(batches, scale * (1 / len(batches)), before_update)

    session.pipeline.train_step = divided  # type: ignore[method-assign]


def _own_mean(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    """Each data rank divides by the tokens of its own micro-batches."""
    whole = session.pipeline.train_step

    def of_own_tokens(batches: Any, scale: Any, before_update: Any = None) -> Tensor:
        own = sum(int((batch[1] != IGNORED).sum()) for batch in batches)
        return whole(batches, 1.0 / max(1, own), before_update)

    session.pipeline.train_step = of_own_tokens  # type: ignore[method-assign]


def _last_micro_batch(factor: float) -> Plant:
    """Multiplies the loss gradient of the last micro-batch."""

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        last = session.config.accumulation_steps - 1
        interpreter = session.pipeline.interpreter

        def change(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
            output = forward(*arguments)
            has_loss = len(arguments) > 1 and arguments[1] is not None
            action = interpreter.action
            if has_loss and action is not None and action.micro_batch == last:
                output.register_hook(lambda gradient: gradient * factor)
            return output

        change_forward(session, change)

    return plant


def _halved_evaluation(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    whole = session.pipeline.evaluate
    session.pipeline.evaluate = lambda *given: whole(*given) / 2  # type: ignore[method-assign]


def _others_samples(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    grid, whole = session.engine.grid, session.batches
    if not grid.data.is_last:
        return

    def batches(step: int, training: bool = True) -> Any:
        session.engine.grid = replace(grid, data=replace(grid.data, rank=0))
        try:
            return whole(step, training)
        finally:
            session.engine.grid = grid

    session.batches = batches  # type: ignore[method-assign]


class _OwnNorm(GlobalNorm):
    """A norm of this rank's gradients only; its constructor is still collective."""

    def __call__(self, pieces: Any, device: torch.device, replicated: bool) -> Tensor:
        with contextlib.ExitStack() as stack:
            put(stack, norm_over, "dist", SimpleNamespace(is_initialized=lambda: False))
            return super().__call__(pieces, device, replicated)


def _own_norm(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    norm: Any = session.engine.global_norm
    norm.__class__ = _OwnNorm


def _old_randomness(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if not (session.engine.grid.pipe.is_last and session.engine.grid.data.is_last):
        return

    def change(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        context = arguments[2]
        old = replace(context, randomness=replace(context.randomness, step=0), shared={})
        return forward(*arguments[:2], old, *arguments[3:])

    change_forward(session, change)
