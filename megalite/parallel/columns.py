"""Column linears with a common input, such as query, key and value. In backward, the all-reduce of the input's gradient
over the tensor axis overlaps with the computation of the weights' gradients, which no other rank needs.

With plain autograd, the all-reduce would begin after the last weight's gradient. Megatron-LM overlaps the two for a
single linear (`LinearWithGradAccumulationAndAsyncCommunication`). joint.py chooses the number of products. Used by
model/.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel import deferred
from megalite.parallel.clock import RANK_CLOCK
from megalite.parallel.collectives import Split, begin_scatter, enter, gather_sequence
from megalite.parallel.joint import Joint
from megalite.parallel.layers import ColumnLinear


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split, count: int, *parts: Any) -> tuple[Tensor, ...]:
        weights, biases = parts[:count], parts[count:]
        ctx.split, ctx.biased = split, [bias is not None for bias in biases]
        x = gather_sequence(x, split.axis) if split.divides else x
        ctx.save_for_backward(x, *weights)
        return tuple(Joint(weights).outputs(x, biases))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        joint, given, summing = Joint(weights), None, None
        slopes = joint.slopes(grads)
        if ctx.needs_input_grad[0]:
            given, summing = _begin_sum(joint.of_input(slopes).view(x.shape), ctx.split)
        of_weights = joint.of_weights(slopes, x.flatten(0, -2))
        of_biases: list[Any] = [None] * len(weights)
        if any(ctx.biased):
            made = zip(joint.of_biases(slopes), ctx.biased, strict=True)
            of_biases = [slope if biased else None for slope, biased in made]
        if summing is not None:
            with RANK_CLOCK.waiting():
                summing.wait()
        return given, None, None, *of_weights, *of_biases


def _begin_sum(given: Tensor, split: Split) -> tuple[Tensor, Any]:
    """Begins to sum the gradient of `split.enter`'s result over the ranks. Returns the gradient of `enter`'s input, and
    the work handle to wait for before reading it; None: it is ready."""
    if split.axis.size == 1:
        return given, None
    if split.divides:
        return begin_scatter(given, split.axis)
    return given, dist.all_reduce(given, group=split.axis.group, async_op=True)


def columns(x: Tensor, linears: Sequence[ColumnLinear], split: Split) -> list[Tensor]:
    """Applies each linear to `split.enter(x)`. x [B, S or S / t, in]; results [B, S, out / t], which may be views of
    one tensor."""
    # A subclass of ColumnLinear, or a wrapper, must be called for its own effects.
    if not split.overlaps or any(type(linear) is not ColumnLinear for linear in linears):
        entered = split.enter(x)
        return [linear(entered) for linear in linears]
    if deferred.is_collecting():
        given = [(linear.weight, linear.bias, linear.sum_over_holders) for linear in linears]
        return deferred.linears(split.enter(x), *zip(*given, strict=True))
    weights = [enter(linear.weight, linear.holders) for linear in linears]
    biases = [
        None if linear.bias is None else enter(linear.bias, linear.holders) for linear in linears
    ]
    return list(_Columns.apply(x, split, len(linears), *weights, *biases))  # type: ignore[arg-type]
