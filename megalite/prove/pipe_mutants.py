"""Faults of the pipe axis: messages, the data of the last stage, tied copies. Next: mutants.py, which lists them."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from megalite.config import Config
from megalite.model.families import read_spec
from megalite.pipeline.steps import Receive
from megalite.programs.schedules import ends_together
from megalite.prove.planting import change_forward
from megalite.prove.trace import Plant, Session


def of_the_pipe(config: Config) -> Iterable[tuple[str, Plant]]:
    """The faults that apply to a resolved config with several stages, by name."""
    if config.accumulation_steps > 1:
        yield "two activations are swapped", _swapped("activation")
        yield "two gradients are swapped", _swapped("gradient")
        yield "the last stage uses micro-batch 0's labels", _stale_labels
        if config.data.reset_attention:
            yield "the last stage uses micro-batch 0's documents", _stale_documents
    spec = read_spec(config.model)
    parallel = config.parallel
    is_tied = spec.tied and not ends_together(
        parallel.schedule, parallel.pipe, parallel.chunks_a_rank
    )
    if (is_tied or spec.stacks is not None) and config.zero_stage in (1, 2):
        yield "the tied gradients are not summed", _tied_sums(0)
        yield "the tied gradients are summed twice", _tied_sums(2)
    if is_tied and config.zero_stage in (1, 2):
        yield "the head's tied copy is stale on resuming", _stale_copy
    if len({spec.rotary_of(layer) for layer in range(spec.num_layers)}) > 1:
        yield "the last stage's layers have the rotary positions of others", _turned_as_others


class _Swapped:
    """A plan in which each of a rank's first two receives of a kind gets the other's value."""

    def __init__(self, plan: Any, kind: str) -> None:
        self.plan, self.kind = plan, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plan, name)

    def steps(self, micro_batches: int, rank: int) -> list[Any]:
        """The plan's steps with the two receives swapped."""
        steps = list(self.plan.steps(micro_batches, rank))
        found = [
            n
            for n, step in enumerate(steps)
            if isinstance(step, Receive) and step.value.kind == self.kind
        ]
        same = [n for n in found if steps[n].value.chunk == steps[found[0]].value.chunk]
        if len(same) > 1:
            first, second = same[:2]
            one, other = steps[first], steps[second]
            # The first message fills the second one's buffer; both are posted before either is used.
            steps[first] = other
            del steps[second]
            steps.insert(first + 1, one)
        return steps


def _swapped(kind: str) -> Plant:
    """Swaps two activations that the last rank receives, or two gradients that the first rank receives."""

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        pipe, pipeline = session.engine.grid.pipe, session.pipeline
        receives = pipe.is_last if kind == "activation" else pipe.is_first
        if receives:
            pipeline.plan = _Swapped(pipeline.plan, kind)  # type: ignore[assignment]

    return plant


def _stale_labels(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    first: list[Any] = []

    def change(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        if len(arguments) > 1 and arguments[1] is not None:
            first.append(arguments[1])
            arguments = (arguments[0], first[0], *arguments[2:])
        return forward(*arguments)

    change_forward(session, change)


def _stale_documents(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if session.engine.grid.pipe.is_first:
        return
    first: list[Any] = []

    def change(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        if len(arguments) > 2:
            context = arguments[2]
            first.append(context.documents)
            stale = replace(context, documents=first[0], shared={})
            arguments = (*arguments[:2], stale, *arguments[3:])
        return forward(*arguments)

    change_forward(session, change)


def _tied_sums(times: int) -> Plant:
    """Sums the gradients of tied copies `times` times."""

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        optimizer: Any = session.engine.optimizer
        whole = optimizer.sum_tied_gradients

        def summed() -> None:
            for _ in range(times):
                whole()

        optimizer.sum_tied_gradients = summed

    return plant


def _stale_copy(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    """Changes the weight that the last rank computes with, but not its master weight."""
    head = session.engine.stage.head
    if event == "resumed" and head is not None:
        head.weight.data.mul_(1.01)


def _turned_as_others(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    """Gives the last stage's layers the rotary positions of another kind of layer, as if it numbered them from 0."""
    stage = session.engine.stage
    kinds = [stage.spec.rotary_of(layer) for layer in range(stage.spec.num_layers)]
    for chunk in stage.chunks.values() if stage.grid.pipe.is_last else ():
        for block in chunk.blocks.values():
            block.attention.rotary = next(kind for kind in kinds if kind != kinds[block.layer])
