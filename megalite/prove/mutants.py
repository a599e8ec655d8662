"""Faults that verify_layouts must find, made from what a run knows of itself: its kinds of parameters, its axes, its
messages. `verify_layouts.py --mutants N` plants them one by one in a layout and tells how many it found.

They are the bugs that layouts really have, among them: gradients scaled by their micro-batch's tokens
(pytorch/torchtitan#2972), a norm that leaves tensors out or that each group takes of its own (NVIDIA/Megatron-LM#5916,
NVIDIA-NeMo/Automodel#3816) or counts twice (NVIDIA-NeMo/Megatron-Bridge#5411), sums over ranks that are missing or made
twice, a tied copy that is stale after a resume, data of another rank or micro-batch (NVIDIA/Megatron-LM#7452).

A mutant is a name and a Plant (trace.py). The same list follows from a config on every rank. Next: verify.py.
"""

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import megalite.engine.norm as norm_over
import megalite.parallel.collectives as collectives
import megalite.parallel.columns as columns_over
import megalite.parallel.loss as loss_over
import megalite.parallel.rows as rows_over
from megalite.config import Config
from megalite.engine.norm import GlobalNorm
from megalite.model.context import Context
from megalite.model.families import read_spec
from megalite.model.parameter_groups import parameter_groups
from megalite.model.transformer import Stage
from megalite.parallel.collectives import Split
from megalite.parallel.grid import Axis, Grid
from megalite.parallel.layers import Placement, placed
from megalite.parallel.rows import Rows
from megalite.pipeline.steps import Receive
from megalite.plan.states import place_of
from megalite.prove.expert_mutants import of_experts
from megalite.prove.trace import Plant, Session, put


def mutants(config: Config) -> dict[str, Plant]:
    """Every mutant of a layout's resolved config, by name."""
    grid = place_of(config, 0)
    result = (
        dict(_of_parameters(config, grid))
        | dict(_of_the_step(config, grid))
        | dict(_of_resuming(grid))
    )
    if grid.pipe.size > 1:
        result |= dict(_of_the_pipe(config))
    if grid.tensor.size > 1:
        result |= dict(_of_the_tensor_axis(config))
    if grid.context.size > 1:
        result |= dict(_of_the_context_axis(config))
    result |= dict(of_experts(config, read_spec(config.model), grid))
    return result


def chosen(names: Iterable[str], count: int) -> list[str]:
    """So many of the names, evenly over all of them."""
    every = list(names)
    count = min(count, len(every))
    return [every[number * len(every) // count] for number in range(count)]


# Parameters. A kind is a name without the layer's number.


def kind_of(name: str) -> str:
    """`layers.3.mlp.up.weight` -> `layers.*.mlp.up.weight`"""
    return re.sub(r"\.\d+\.", ".*.", name)


def _of_parameters(config: Config, grid: Grid) -> Iterable[tuple[str, Plant]]:
    with torch.device("meta"):
        stage = Stage(read_spec(config.model), Grid())
    decay = (
        config.document.optimizer.params.weight_decay
        if config.document.optimizer is not None
        else 0.0
    )
    groups = parameter_groups(stage, decay, config.train.parameter_groups)
    decays = {id(value) for group in groups if group["weight_decay"] for value in group["params"]}
    kinds: dict[str, bool] = {}
    for value, place in placed(stage):
        kinds[kind_of(place.name)] = id(value) in decays
    for kind, is_decayed in kinds.items():
        if grid.data.size > 1:
            yield f"{kind}: gradient of the last data rank is lost", _gradient(kind, "data", 0.0)
        if grid.context.size > 1:
            yield (
                f"{kind}: gradient of the last context rank is lost",
                _gradient(kind, "context", 0.0),
            )
        if grid.tensor.size > 1:
            yield (
                f"{kind}: gradient of the last tensor rank is doubled",
                _gradient(kind, "tensor", 2.0),
            )
        yield f"{kind}: counted twice in the norm", _norm_weighs(kind, 2.0)
        yield f"{kind}: left out of the norm", _norm_weighs(kind, 0.0)
        if is_decayed:
            yield f"{kind}: weight decay dropped", _no_decay(kind)
        yield f"{kind}: shard shifted by one at the start", _shifted(kind, "built", "weight")
        yield f"{kind}: shard shifted by one on resuming", _shifted(kind, "resumed", "weight")
        yield (
            f"{kind}: first moment shifted by one on resuming",
            _shifted(kind, "resumed", "exp_avg"),
        )


def _matching(session: Session, kind: str) -> list[tuple[Any, Placement]]:
    return [
        (value, place)
        for value, place in placed(session.engine.stage)
        if kind_of(place.name) == kind
    ]


def _is_last_on(session: Session, axis: str) -> bool:
    found: Axis = getattr(session.engine.grid, axis)
    return found.is_last


def _gradient(kind: str, axis: str, factor: float) -> Plant:
    """On the last rank of the axis."""

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        if _is_last_on(session, axis):
            for value, _ in _matching(session, kind):
                value.register_hook(lambda gradient: gradient * factor)

    return plant


class _Weighing(GlobalNorm):
    """Counts the squares of one kind `times` over."""

    kind: str
    times: float

    def __call__(self, pieces: Any, device: torch.device, replicated: bool) -> Tensor:
        def weighed() -> Any:
            for place, gradient in pieces:
                yield (
                    place,
                    gradient * self.times**0.5 if kind_of(place.name) == self.kind else gradient,
                )

        return super().__call__(weighed(), device, replicated)


def _norm_weighs(kind: str, times: float) -> Plant:
    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        norm: Any = session.engine.global_norm
        norm.__class__, norm.kind, norm.times = _Weighing, kind, times

    return plant


def _no_decay(kind: str) -> Plant:
    """Adds to the weights what their decay takes away, after each update."""

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        step, engine = session.engine.step, session.engine
        names = {place.name for _, place in _matching(session, kind)}

        def undecayed(lr_kwargs: Any = None) -> None:
            group = engine.basic_optimizer.param_groups[0]  # type: ignore[union-attr]
            decays = max(g["weight_decay"] for g in engine.basic_optimizer.param_groups)  # type: ignore[union-attr]
            before = {shard.placement.name: shard.master.clone() for shard in engine.shards()}
            step(lr_kwargs)
            for shard in engine.shards():
                if shard.placement.name in names:
                    shard.master.add_(before[shard.placement.name], alpha=group["lr"] * decays)
            engine.masters_changed()

        engine.step = undecayed  # type: ignore[method-assign]

    return plant


def _shifted(kind: str, at: str, part: str) -> Plant:
    """On the last rank, of what it holds."""

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


# The step: loss, data, randomness.


def _of_the_step(config: Config, grid: Grid) -> Iterable[tuple[str, Plant]]:
    yield "the loss is a mean of the ranks' own means", _own_mean
    yield (
        "gradients are divided by the micro-batches once more",
        _scaled_step(lambda batches: 1 / len(batches)),
    )
    yield "the last micro-batch counts twice in backward", _last_micro_batch(2.0)
    yield "the last micro-batch is lost in backward", _last_micro_batch(0.0)
    yield "the evaluation's loss is halved", _halved_evaluation
    if grid.data.size > 1:
        yield "the last data rank computes the first one's samples", _others_samples
    if config.world_size > 1:
        yield "each rank clips by a norm of its own", _own_norm
    if read_spec(config.model).dropout > 0:
        yield "dropout of the last ranks is that of step 0", _old_randomness


def _scaled_step(factor: Callable[[Any], float]) -> Plant:
    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        whole = session.pipeline.train_step

        def scaled(batches: Any, scale: float, before_update: Any = None) -> Tensor:
            return whole(batches, scale * factor(batches), before_update)

        session.pipeline.train_step = scaled  # type: ignore[method-assign]

    return plant


def _own_mean(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    """Each data rank divides by the tokens of its own micro-batches."""
    whole = session.pipeline.train_step

    def of_own_tokens(batches: Any, scale: float, before_update: Any = None) -> Tensor:
        own = sum(int((batch[1] != loss_over.IGNORED).sum()) for batch in batches)
        return whole(batches, 1.0 / max(1, own), before_update)

    session.pipeline.train_step = of_own_tokens  # type: ignore[method-assign]


def _forward_of(
    session: Session, change: Callable[[Callable[..., Tensor], tuple[Any, ...]], Tensor]
) -> None:
    """Puts `change(forward, arguments)` in the place of the stage's forward, in training alone."""
    stage, forward = session.engine.stage, session.engine.stage.forward

    def changed(*arguments: Any) -> Tensor:
        return change(forward, arguments) if torch.is_grad_enabled() else forward(*arguments)

    stage.forward = changed


def _last_micro_batch(factor: float) -> Plant:
    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        last, interpreter = session.config.accumulation_steps - 1, session.pipeline.interpreter

        def change(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
            output = forward(*arguments)
            has_loss = len(arguments) > 1 and arguments[1] is not None
            if (
                has_loss
                and interpreter.action is not None
                and interpreter.action.micro_batch == last
            ):
                output.register_hook(lambda gradient: gradient * factor)
            return output

        _forward_of(session, change)

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
    """Is made like any other, and sums over this rank alone."""

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        with contextlib.ExitStack() as alone:
            put(alone, norm_over, "dist", SimpleNamespace(is_initialized=lambda: False))
            return super().__call__(*given, **named)


def _own_norm(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    session.engine.global_norm.__class__ = _OwnNorm


def _old_randomness(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if not (session.engine.grid.pipe.is_last and session.engine.grid.data.is_last):
        return

    def change(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        context = arguments[2]
        old = replace(context, randomness=replace(context.randomness, step=0), shared={})
        return forward(*arguments[:2], old, *arguments[3:])

    _forward_of(session, change)


# Resuming.


def _of_resuming(grid: Grid) -> Iterable[tuple[str, Plant]]:
    yield "the optimizer counts its steps from zero on resuming", _restarted_steps
    yield "the run repeats a batch on resuming", _repeated_batch


def _restarted_steps(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if event == "resumed":
        for state in session.engine.basic_optimizer.state.values():  # type: ignore[union-attr]
            if "step" in state:
                state["step"] = (
                    torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0
                )


def _repeated_batch(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if event == "resumed":
        whole = session.batches
        session.batches = lambda step, training=True: whole(max(0, step - 1), training)  # type: ignore[method-assign]


# The pipe axis: messages, tied copies, data of a stage.


def _of_the_pipe(config: Config) -> Iterable[tuple[str, Plant]]:
    if config.accumulation_steps > 1:
        yield "two activations change places", _swapped("activation")
        yield "two gradients change places", _swapped("gradient")
        yield "the last stage uses micro-batch 0's labels", _stale_labels
        if config.data.reset_attention:
            yield "the last stage uses micro-batch 0's documents", _stale_documents
    spec = read_spec(config.model)
    is_tied = spec.tied and config.parallel.schedule != "zb-v"
    if (is_tied or spec.stacks is not None) and config.zero_stage in (1, 2):
        yield "the tied gradients are not summed", _tied_sums(0)
        yield "the tied gradients are summed twice", _tied_sums(2)
    if is_tied and config.zero_stage in (1, 2):
        yield "the head's tied copy is stale on resuming", _stale_copy


class _Swapped:
    """A plan whose first two receives of a kind on the last rank of the axis are posted for one another's value."""

    def __init__(self, plan: Any, kind: str) -> None:
        self.plan, self.kind = plan, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plan, name)

    def steps(self, micro_batches: int, rank: int) -> list[Any]:
        """As the plan's."""
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
            # The second one's buffer is filled by the first message; both are posted before either is used.
            steps[first] = other
            del steps[second]
            steps.insert(first + 1, one)
        return steps


def _swapped(kind: str) -> Plant:
    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        pipe = session.engine.grid.pipe
        if pipe.is_last if kind == "activation" else pipe.is_first:
            session.pipeline.plan = _Swapped(session.pipeline.plan, kind)  # type: ignore[assignment]

    return plant


def _stale_labels(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    first: list[Any] = []

    def change(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        if len(arguments) > 1 and arguments[1] is not None:
            first.append(arguments[1])
            arguments = (arguments[0], first[0], *arguments[2:])
        return forward(*arguments)

    _forward_of(session, change)


def _stale_documents(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if session.engine.grid.pipe.is_first:
        return
    first: list[Any] = []

    def change(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        if len(arguments) > 2:
            first.append(arguments[2].documents)
            arguments = (
                *arguments[:2],
                replace(arguments[2], documents=first[0], shared={}),
                *arguments[3:],
            )
        return forward(*arguments)

    _forward_of(session, change)


def _tied_sums(times: int) -> Plant:
    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        optimizer: Any = session.engine.optimizer
        whole = optimizer.sum_tied_gradients

        def summed() -> None:
            for _ in range(times):
                whole()

        optimizer.sum_tied_gradients = summed

    return plant


def _stale_copy(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    """The weight that the last rank computes with, not the master."""
    head = session.engine.stage.head
    if event == "resumed" and head is not None:
        head.weight.data.mul_(1.01)


# The tensor axis: its sums.


def _of_the_tensor_axis(config: Config) -> Iterable[tuple[str, Plant]]:
    if config.parallel.sequence:
        names = (("_GatherSequence", "backward"), ("_ScatterSequence", "forward"))
    else:
        names = (("_Enter", "backward"), ("_Leave", "forward"))
    for owner, method in names:
        yield f"collectives.{owner}.{method}: the sum is missing", _sums_of(owner, method, 0)
        yield f"collectives.{owner}.{method}: the sum is made twice", _sums_of(owner, method, 2)
    if config.zero_stage != 3 and config.parallel.schedule in ("1f1b", "interleaved"):
        yield "columns._begin_sum: the sum is missing", _sums_of_columns(0)
        yield "columns._begin_sum: the sum is made twice", _sums_of_columns(2)
    yield "the loss does not sum over the vocabulary's parts", _loss_alone


_sum, _scatter = collectives.sum_over, collectives._scatter
_begin_sum = columns_over._begin_sum


def _sums_of(owner: str, method: str, times: int) -> Plant:
    """Of one of the collectives that autograd passes through. times 0: each rank keeps its own part; 2: twice the
    sum."""

    def summed(tensor: Tensor, axis: Axis) -> Tensor:
        return _sum(tensor, axis).mul_(2) if times else tensor

    def scattered(whole: Tensor, axis: Axis) -> Tensor:
        return (
            _scatter(whole, axis) * 2
            if times
            else whole.unflatten(1, (axis.size, -1))[:, axis.rank].contiguous()
        )

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
    """Of linears of one input, whose sum begins before the gradients of their weights are made."""

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


# The context axis: its sums, and which tokens a rank has.


def _of_the_context_axis(config: Config) -> Iterable[tuple[str, Plant]]:
    if config.parallel.context_attention == "gather":
        yield "rows._GatherRows.backward: the sum is missing", _key_gradients(0)
        yield "rows._GatherRows.backward: the sum is made twice", _key_gradients(2)
    yield "the last context rank has the positions of the first", _others_rows
    if config.data.reset_attention:
        yield "documents are not kept apart", _documents_together


_sum_of_rows = rows_over._scatter


def _key_gradients(times: int) -> Plant:
    """times 0: each rank keeps the gradients that its own queries give its own keys; 2: twice the sum."""

    def scattered(whole: Tensor, rows: Rows) -> Tensor:
        if times:
            return _sum_of_rows(whole, rows) * times
        return rows.cut(whole, whole.dim() - 2)

    def plant(session: Session, event: str, stack: contextlib.ExitStack) -> None:
        if event == "built":
            put(stack, rows_over, "_scatter", scattered)

    return plant


def _context_of(session: Session, change: Callable[[Context], Context]) -> None:
    """Changes the context of every forward in training."""

    def changed(forward: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
        if len(arguments) > 2:
            arguments = (*arguments[:2], change(arguments[2]), *arguments[3:])
        return forward(*arguments)

    _forward_of(session, changed)


def _others_rows(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    if not session.engine.grid.context.is_last:
        return

    def change(context: Context) -> Context:
        assert context.rows is not None
        first = replace(context.rows, axis=replace(context.rows.axis, rank=0))
        return replace(context, rows=first, shared={})

    _context_of(session, change)


def _documents_together(session: Session, event: str, stack: contextlib.ExitStack) -> None:
    _context_of(session, lambda context: replace(context, documents=None, bounds=None, shared={}))
