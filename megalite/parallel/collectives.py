"""Differentiable collectives: sums, gathers and scatters over an axis, each with its counterpart in backward. Next:
layers.py, which puts them around matrix products.

Megatron-LM (arXiv 1909.08053, section 3) names them f and g: `enter` copies in forward and all-reduces gradients in
backward, `leave` all-reduces in forward and copies gradients in backward. Between them every rank of the tensor axis
works on its own slice. With sequence parallelism (arXiv 2205.05198, section 4.2.2) the ranks divide the sequence
outside of them: `enter` all-gathers it and `leave` reduce-scatters the sums; as many bytes are sent.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.clock import RANK_CLOCK
from megalite.parallel.grid import ALONE, Axis


def sum_over(tensor: Tensor, axis: Axis) -> Tensor:
    """Sums `tensor` in place over the axis; without autograd."""
    if axis.size > 1:
        with RANK_CLOCK.waiting():
            dist.all_reduce(tensor, group=axis.group)
    return tensor


def max_over(tensor: Tensor, axis: Axis) -> Tensor:
    """Takes the maximum of `tensor` over the axis, in place; without autograd."""
    if axis.size > 1:
        with RANK_CLOCK.waiting():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=axis.group)
    return tensor


def gather_over(tensor: Tensor, axis: Axis) -> Tensor:
    """The tensors of all ranks, of equal shape, stacked in the order of the axis: [size, …]; without autograd."""
    if axis.size == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.all_gather(parts, tensor.contiguous(), group=axis.group)
    return torch.stack(parts)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_over(grads[0].contiguous(), ctx.axis), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: Axis) -> Tensor:
        if not partial.is_contiguous():
            return sum_over(partial.contiguous(), axis)
        ctx.mark_dirty(partial)
        return sum_over(partial, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def enter(hidden: Tensor, axis: Axis) -> Tensor:
    """f: passes a tensor that is the same on every rank of the axis into split work; its gradients are summed."""
    return _Enter.apply(hidden, axis) if axis.size > 1 else hidden  # type: ignore[return-value]


def leave(partial: Tensor, axis: Axis) -> Tensor:
    """g: all-reduces the partial sums of the ranks of the axis, in place."""
    return _Leave.apply(partial, axis) if axis.size > 1 else partial  # type: ignore[return-value]


def gather_sequence(part: Tensor, axis: Axis) -> Tensor:
    """All-gathers the ranks' [B, S / t, …] to [B, S, …]; without autograd."""
    parts = part.new_empty((axis.size * part.shape[0], *part.shape[1:]))
    with RANK_CLOCK.waiting():
        dist.all_gather_into_tensor(parts, part.contiguous(), group=axis.group)
    return parts.unflatten(0, (axis.size, -1)).transpose(0, 1).flatten(1, 2)


def begin_scatter(whole: Tensor, axis: Axis) -> tuple[Tensor, Any]:
    """Begins a reduce-scatter of [B, S, …] over the ranks. Returns this rank's part [B, S / t, …], and the work handle
    to wait for before reading it; without autograd."""
    parts = whole.unflatten(1, (axis.size, -1)).transpose(0, 1).contiguous().flatten(0, 1)
    part = whole.new_empty((parts.shape[0] // axis.size, *parts.shape[1:]))
    return part, dist.reduce_scatter_tensor(part, parts, group=axis.group, async_op=True)


def _scatter(whole: Tensor, axis: Axis) -> Tensor:
    with RANK_CLOCK.waiting():
        part, summing = begin_scatter(whole, axis)
        summing.wait()
    return part


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gather_sequence(part, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter(grads[0], ctx.axis), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _scatter(partial, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather_sequence(grads[0], ctx.axis), None


@dataclass(frozen=True)
class Split:
    """How hidden states are stored between the matrix products that the tensor axis splits: whole on every rank, or
    (`sequence`) a part of the sequence on each.

    overlaps: whether weights are available outside their modules, so that columns.py may compute the gradients of
    several linears together; ZeRO-3 gathers weights only for the calls of their own modules.
    """

    axis: Axis
    sequence: bool = False
    overlaps: bool = True

    @property
    def divides(self) -> bool:
        return self.sequence and self.axis.size > 1

    @property
    def users(self) -> Axis:
        """The ranks that apply the same whole weight, such as a norm's, each to its part of the tokens. The weight goes
        through `enter` over them, which sums the parts of its gradient."""
        return self.axis if self.divides else ALONE

    def enter(self, hidden: Tensor) -> Tensor:
        """[B, S or S / t, D] between products -> [B, S, D] for split work."""
        if self.divides:
            return _GatherSequence.apply(hidden, self.axis)  # type: ignore[return-value]
        return enter(hidden, self.axis)

    def leave(self, partial: Tensor) -> Tensor:
        """Partial sums [B, S, D], which may be overwritten -> [B, S or S / t, D]."""
        if self.divides:
            return _ScatterSequence.apply(partial, self.axis)  # type: ignore[return-value]
        return leave(partial, self.axis)

    def length(self, hidden: Tensor) -> int:
        """S of hidden states [B, S or S / t, D] between products."""
        return hidden.shape[1] * (self.axis.size if self.divides else 1)

    def rows(self, length: int) -> range:
        """The tokens, of `length`, that this rank holds between products."""
        if not self.divides:
            return range(length)
        part = length // self.axis.size
        return range(self.axis.rank * part, (self.axis.rank + 1) * part)
