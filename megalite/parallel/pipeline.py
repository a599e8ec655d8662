"""One step of training over the pipe axis: the 1F1B schedule, driving DeepSpeed's engine on each stage.

Every stage is a whole DeepSpeed engine with its own ZeRO shards over its data axis; what this file adds is the
order of forwards and backwards and the two messages at each boundary. So ZeRO-2 works through the pipeline as it
does without: a backward here is an engine's backward. With pipe 1 it is plain gradient accumulation.

Schedule (arXiv 2104.04473, section 2.2): stage i of p runs min(p - i - 1, m) forwards, then one forward and one
backward in turn, then the backwards that are left; it holds min(p - i, m) micro-batches at most.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.grid import Axis

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Any]
"""Tokens and labels [B, S] of a micro-batch, and the context (model/context.py) that its stages are called with."""


class _Continue(torch.autograd.Function):
    """A scalar whose backward gives `gradient` to `output`, whatever its own gradient is: the gradient that came
    from the next stage already carries DeepSpeed's loss scale."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return output.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class Boundary:
    """The messages of one rank with others on the pipe axis. Sends do not wait: a tensor is kept until it is gone.
    Each direction has a group of its own (Axis.towards), so that two stages that send to each other cannot block."""

    def __init__(self, axis: Axis, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.axis, self.shape, self.dtype, self.device = axis, shape, dtype, device
        self.sent: list[tuple[Any, Tensor]] = []

    def send(self, tensor: Tensor, place: int) -> None:
        """To the stage at `place` on the axis."""
        tensor = tensor.detach().contiguous()
        self.sent = [(work, kept) for work, kept in self.sent if not work.is_completed()]
        group = self.axis.towards(self.axis.rank, place)
        self.sent.append((dist.isend(tensor, self.axis.ranks[place], group=group), tensor))

    def receive(self, place: int) -> Tensor:
        """From the stage at `place` on the axis."""
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        dist.recv(tensor, self.axis.ranks[place], group=self.axis.towards(place, self.axis.rank))
        return tensor

    def finish(self) -> None:
        """Waits until all that was sent is gone."""
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()


class Pipeline:
    """Runs the micro-batches of a step, or of an evaluation, through the stages.

    engine: this rank's; shape [B, S, D] of what crosses stages for a micro-batch; dtype of activations.
    """

    def __init__(self, engine: Any, axis: Axis, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.engine, self.axis = engine, axis
        self.boundary = Boundary(axis, shape, dtype, engine.device)
        self.instruction = ""
        """What this rank does now, in words: for a report when a run hangs."""
        self.micro_batch = 0
        """Whose forward was begun last."""
        self.loss = torch.zeros(())
        """Sum of the losses of this step's micro-batches so far (fp32 scalar), 0 but on the last stage."""
        self.peaks: list[tuple[int, int, Tensor]] = []
        """Of this step, what tells where numbers stopped being finite: (0 forward or 1 backward, micro-batch, largest
        absolute value of what left it). Scalars on the device, which nobody waits for."""

    def train_step(
        self,
        batches: Sequence[Batch],
        scale: float,
        before_update: Callable[[], None] | None = None,
    ) -> Tensor:
        """All forwards, backwards and the optimizer's step.

        batches: of each micro-batch of this data rank. scale: what a micro-batch's sum
        of losses is multiplied with before backward; DeepSpeed divides by the accumulation steps and averages
        over the data axis afterwards. before_update: called when all gradients
        stand. Returns the sum of the losses (fp32 scalar), 0 but on the last stage.
        """
        engine, axis = self.engine, self.axis
        count = len(batches)
        ahead = min(axis.size - axis.rank - 1, count)
        waiting: list[tuple[Tensor, Tensor]] = []
        self.loss, self.peaks = torch.zeros((), device=engine.device), []
        for k in range(count + ahead):
            if k < count:
                source, output = self._forward(k, *batches[k])
                waiting.append((source, output))
                self.note_peak(0, k, output)
                if axis.is_last:
                    self.loss += output.detach()
            if k >= ahead:
                self._backward(k - ahead, *waiting.pop(0), scale)
                if before_update is not None and not waiting and k == count + ahead - 1:
                    before_update()
                self.instruction = f"reduction or update after micro-batch {k - ahead}"
                engine.step()
        self._finish()
        return self.loss

    def note_peak(self, phase: int, k: int, tensor: Tensor) -> None:
        """Adds to `peaks`."""
        self.peaks.append((phase, k, torch.linalg.vector_norm(tensor.detach(), float("inf"))))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Sum of the losses of the micro-batches (fp32 scalar), 0 but on the last stage."""
        total = torch.zeros((), device=self.engine.device)
        for k, batch in enumerate(batches):
            _, output = self._forward(k, *batch)
            if self.axis.is_last:
                total += output
        self._finish()
        return total

    def _finish(self) -> None:
        self.instruction = "sends of the last micro-batches"
        self.boundary.finish()
        self.instruction = ""

    def _forward(self, k: int, tokens: Tensor, labels: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """Micro-batch k through this stage: (what came in, what goes out)."""
        self.instruction, self.micro_batch = f"forward of micro-batch {k}", k
        axis = self.axis
        source = tokens
        if not axis.is_first:
            source = self.boundary.receive(axis.rank - 1).requires_grad_(torch.is_grad_enabled())
        with axis.clock.computing():
            output = self.engine(source, labels if axis.is_last else None, context)
        if not axis.is_last:
            self.boundary.send(output, axis.rank + 1)
        return source, output

    def _backward(self, k: int, source: Tensor, output: Tensor, scale: float) -> None:
        self.instruction = f"backward of micro-batch {k}"
        axis = self.axis
        if axis.is_last:
            self.engine.backward(output * scale)
        else:
            gradient = self.boundary.receive(axis.rank + 1)
            self.engine.backward(_Continue.apply(output, gradient), scale_wrt_gas=False)
        if not axis.is_first:
            assert source.grad is not None
            self.note_peak(1, k, source.grad)
            self.boundary.send(source.grad, axis.rank - 1)
