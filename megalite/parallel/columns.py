"""Column linears that read one input, such as query, key and value: while the gradient of that input is summed over the
tensor axis, backward makes the gradients of the weights, which no other rank waits for.

Left to autograd, the sum would begin after the last weight's gradient. Megatron-LM overlaps the two for one linear
(`LinearWithGradAccumulationAndAsyncCommunication`). Used by model/.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalite.parallel import deferred
from megalite.parallel.clock import RANK_CLOCK
from megalite.parallel.collectives import Split, enter
from megalite.parallel.grid import Axis
from megalite.parallel.layers import ColumnLinear


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, count: int, *parts: Any) -> tuple[Tensor, ...]:
        weights, biases = parts[:count], parts[count:]
        ctx.axis, ctx.biased = axis, [bias is not None for bias in biases]
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        given, summing = None, None
        if ctx.needs_input_grad[0]:
            # The last product first: the order in which autograd would add them up.
            for slope, weight in reversed([*zip(slopes, weights, strict=True)]):
                part = slope @ weight
                given = part if given is None else given.add_(part)
            assert given is not None
            given = given.contiguous()
            summing = dist.all_reduce(given, group=ctx.axis.group, async_op=True)
        rows = x.flatten(0, -2)
        of_weights = [slope.flatten(0, -2).t() @ rows for slope in slopes]
        of_biases = [
            slope.flatten(0, -2).sum(0) if biased else None
            for slope, biased in zip(slopes, ctx.biased, strict=True)
        ]
        if summing is not None:
            with RANK_CLOCK.waiting():
                summing.wait()
        return given, None, None, *of_weights, *of_biases


def columns(x: Tensor, linears: Sequence[ColumnLinear], split: Split) -> list[Tensor]:
    """Each linear of `split.enter(x)`. x [B, S or S / t, in]; results [B, S, out / t]."""
    apart = split.axis.size == 1 or split.divides or not split.overlaps
    apart = apart or deferred.is_collecting() or not torch.is_grad_enabled()
    # What wraps a linear, or hooks into its call, is called.
    if apart or any(type(linear) is not ColumnLinear for linear in linears):
        entered = split.enter(x)
        return [linear(entered) for linear in linears]
    weights = [enter(linear.weight, linear.holders) for linear in linears]
    biases = [
        None if linear.bias is None else enter(linear.bias, linear.holders) for linear in linears
    ]
    return list(_Columns.apply(x, split.axis, len(linears), *weights, *biases))  # type: ignore[arg-type]
