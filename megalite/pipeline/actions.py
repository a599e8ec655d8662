"""A training step and an evaluation over DeepSpeed's engine: how the actions F, B, I and W are run.

Each rank has one engine, which holds all its chunks and their ZeRO shards over its data axis. A B is a backward of the
engine, and so is a W, which computes the weight gradients that an earlier I deferred (parallel/deferred.py).
DeepSpeed's hooks sum, shard and reduce as usual, so ZeRO 0, 1 and 2 work through the pipeline. With pipe 1 this is
plain gradient accumulation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megalite.parallel.clock import RANK_CLOCK
from megalite.parallel.deferred import WeightGradients, collecting
from megalite.parallel.grid import Axis
from megalite.parallel.timeline import RANK_TIMELINE
from megalite.pipeline.interpreter import Interpreter
from megalite.pipeline.mailbox import Mailbox
from megalite.pipeline.pipeline_plan import PipelinePlan
from megalite.programs.program import Action

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Any]
"""Tokens and labels [B, S] of a micro-batch, and the context (model/context.py) that its chunks are called with."""


class _Continue(torch.autograd.Function):
    """A scalar whose backward passes `gradient` to `output` and ignores its own gradient: the gradient from the next
    chunk already includes DeepSpeed's loss scale."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class Pipeline:
    """Runs the micro-batches of a step, or of an evaluation, through the chunks.

    engine: this rank's. shape: [B, S, D] of a micro-batch's activations between chunks. dtype: of activations.
    """

    def __init__(
        self,
        engine: Any,
        axis: Axis,
        plan: PipelinePlan,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.engine, self.axis, self.plan, self.shape = engine, axis, plan, shape
        several = len(plan.cut.home) > plan.pipe
        self.interpreter = Interpreter(
            Mailbox(axis, engine.device), plan.cut.last_chunk, dtype, several
        )
        self.after = ""
        """The current phase after a step's actions, in words; empty during the actions."""
        self.loss = torch.zeros(())
        """Sum of the losses of this step's micro-batches so far (fp32 scalar); 0 except on the last chunk's rank."""
        self.peaks: list[tuple[Action, Tensor]] = []
        """The largest absolute value of each action's output in this step, which shows where numbers stopped being
        finite. Scalars on the device; the host does not wait for them."""

    @property
    def instruction(self) -> str:
        """What this rank is doing now, in words, for the report of a hang."""
        return self.interpreter.instruction or self.after

    @property
    def waits_for(self) -> int | None:
        """The global rank whose message this rank is waiting for."""
        return self.interpreter.mailbox.waits_for

    def train_step(
        self,
        batches: Sequence[Batch],
        scale: float | Tensor,
        before_update: Callable[[], None] | None = None,
    ) -> Tensor:
        """Runs all forwards, all backwards and the optimizer's step.

        batches: the micro-batches of this data rank. scale: the factor of a micro-batch's sum of losses before
        backward, a tensor if the host need not know it; DeepSpeed averages over the data axis afterwards.
        before_update: called when all gradients are complete.
        Returns the sum of the losses (fp32 scalar), 0 except on the last chunk's rank.
        """
        self.loss, self.peaks = torch.zeros((), device=self.engine.device), []
        step = _TrainingStep(self, batches, scale)
        self.engine.begin_step()
        steps = self.plan.steps(len(batches), self.axis.rank)
        self.interpreter.run(steps, step.perform, lambda value: self.shape)
        self.after = "reduction or update"
        with RANK_TIMELINE.span("update", "reduction, norm, update"):
            if before_update is not None:
                before_update()
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.step()
        self.after = ""
        return self.loss

    @torch.no_grad()
    def evaluate(self, count: int, read: Callable[[int], Batch]) -> Tensor:
        """Sum of the losses of `count` micro-batches (fp32 scalar), 0 except on the last chunk's rank. For a classifier
        its counts are included (model/classifier.py).

        read: returns a micro-batch by its number; called once for each, in order, when this rank reaches it. The
        micro-batch is released after this rank's last chunk.
        """
        total = torch.zeros(self.engine.stage.score_shape, device=self.engine.device)
        last, held = self.plan.cut.last_chunk, dict[int, Batch]()
        own_last = max(c for c, rank in enumerate(self.plan.cut.home) if rank == self.axis.rank)

        def forward(action: Action, source: Tensor | None) -> Tensor | None:
            number = action.micro_batch
            batch = held.pop(number) if number in held else read(number)
            if action.chunk < own_last:
                held[number] = batch
            tokens, labels, context = _parts(batch)
            inputs = tokens if source is None else source
            with RANK_CLOCK.computing():
                output = self.engine(
                    inputs, labels if action.chunk == last else None, context, action.chunk
                )
            if action.chunk < last:
                return output
            total.add_(output)
            return None

        steps = self.plan.evaluation_steps(count, self.axis.rank)
        self.interpreter.run(steps, forward, lambda value: self.shape)
        return total

    @torch.no_grad()
    def logits(self, tokens: Tensor, shape: tuple[int, ...], context: Any) -> Tensor | None:
        """Logits [B, S or S / c, V / t] for ids [B, S or S / c], without dropout, on the rank with the last chunk; None
        on others. shape: of activations between chunks. context: as in `Batch`."""
        found: list[Tensor] = []

        def forward(action: Action, source: Tensor | None) -> Tensor | None:
            output = self.engine(tokens if source is None else source, None, context, action.chunk)
            if action.chunk < self.plan.cut.last_chunk:
                return output
            found.append(output)
            return None

        self.engine.eval()
        self.interpreter.run(
            self.plan.evaluation_steps(1, self.axis.rank), forward, lambda value: shape
        )
        self.engine.train()
        return found[0] if found else None

    def note_peak(self, action: Action, tensor: Tensor) -> None:
        """Appends the largest absolute value of `tensor` to `peaks`."""
        self.peaks.append((action, torch.linalg.vector_norm(tensor.detach(), float("inf"))))


class _TrainingStep:
    """The actions of one step on this rank, and what its forwards keep for its backwards."""

    def __init__(self, pipeline: Pipeline, batches: Sequence[Batch], scale: float | Tensor) -> None:
        self.pipeline = pipeline
        self.engine = pipeline.engine
        self.batches = batches
        self.scale = scale
        program = pipeline.plan.program(len(batches))
        self.last, self.halved = program.last_chunk, program.splits_backward
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.waiting: dict[tuple[int, int], WeightGradients] = {}
        self.boundaries = _boundaries(
            program.actions[pipeline.axis.rank], self.last, self.engine.hands_over_by_chunk
        )

    def perform(self, action: Action, value: Tensor | None) -> Tensor | None:
        """One action (interpreter.py)."""
        match action.kind:
            case "F":
                return self._forward(action, value)
            case "W":
                self._give(action, self.waiting.pop(action[1:]))
                return None
        return self._backward(action, value)

    def _forward(self, action: Action, source: Tensor | None) -> Tensor | None:
        _, chunk, k = action
        tokens, labels, context = _parts(self.batches[k])
        source = tokens if source is None else source.detach().requires_grad_()
        waiting = WeightGradients() if (chunk, k) in self.halved else None
        # A split backward bypasses the engine: its hooks on the output would start DeepSpeed's backward in I.
        call = self.engine if waiting is None else self.engine.module
        with collecting(waiting), RANK_CLOCK.computing():
            output = call(source, labels if chunk == self.last else None, context, chunk)
        if waiting is not None:
            self.waiting[chunk, k] = waiting
        self.kept[chunk, k] = source, output
        self.pipeline.note_peak(action, output)
        if chunk == self.last:
            self.pipeline.loss += output.detach()
            return None
        given = output.detach()
        # Backward needs the output's place in the graph, not its numbers.
        output.data = output.new_empty(0)
        return given

    def _backward(self, action: Action, gradient: Tensor | None) -> Tensor | None:
        kind, chunk, k = action
        source, output = self.kept.pop((chunk, k))
        loss = output * self.scale if gradient is None else _Continue.apply(output, gradient)
        if kind == "B":
            self.engine.set_gradient_accumulation_boundary(action in self.boundaries)
            self.engine.backward(loss, scale_wrt_gas=False)
        else:
            waiting = self.waiting[chunk, k]
            with collecting(waiting):
                loss_scale = torch.full_like(loss, self.engine.current_loss_scale)
                torch.autograd.backward(loss, loss_scale)
            if chunk == self.last:
                # The head's gradient is as large as its weight and already computed, so it is not kept until W.
                self._give(action, waiting.split_off(self.engine.stage.head_parameters))
        if chunk == 0:
            return None
        assert source.grad is not None
        given, source.grad = source.grad, None
        self.pipeline.note_peak(action, given)
        return given

    def _give(self, action: Action, waiting: WeightGradients) -> None:
        """Runs a backward that gives the parameters their deferred gradients."""
        self.engine.set_gradient_accumulation_boundary(action in self.boundaries)
        self.engine.backward(self.engine(waiting), scale_wrt_gas=False)


def _parts(batch: Batch) -> tuple[Tensor, Tensor, Any]:
    tokens, labels, *context = batch
    return tokens, labels, context[0] if context else None


def _boundaries(actions: Sequence[Action], last_chunk: int, by_chunk: bool) -> set[Action]:
    """The backwards that are gradient accumulation boundaries: the step's last. by_chunk: also the last of each chunk
    and of the head (Engine.hands_over_by_chunk)."""
    closing = [action for action in actions if action.kind in "BW"]
    if not by_chunk:
        return set(closing[-1:])
    found = {action.chunk: action for action in closing}
    head = [action for action in actions if action.kind == "I" and action.chunk == last_chunk]
    return {*found.values(), *head[-1:]}
