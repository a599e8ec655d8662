"""Products of rows that are sorted by group with each group's own matrix: what experts compute. Next: model/experts.py.

torch's `grouped_mm` makes all of them in one kernel and leaves the groups' sizes on the device. It takes matrices
whose rows are multiples of 16 bytes, on GPUs in bf16, and not none; others go through a loop, its twin, which waits for
the sizes.

n rows, G groups; ends [G] int32: the row after each group's last one, so that `ends[-1]` is n. A group may be empty.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.parallel.deferred import WeightGradients, anchor, waiting_now

ALIGNMENT_BYTES = 16


def group_ends(sorted_groups: Tensor, count: int) -> Tensor:
    """`ends` of rows whose groups, ascending, are `sorted_groups` [n]."""
    every = torch.arange(count, device=sorted_groups.device)
    return torch.searchsorted(sorted_groups, every, right=True).int()


def grouped_linear(rows: Tensor, weight: nn.Parameter, ends: Tensor) -> Tensor:
    """rows [n, in] through weight [G, out, in], each by its group's matrix -> [n, out]."""
    waiting = waiting_now()
    if waiting is None:
        return _Grouped.apply(rows, weight, ends)  # type: ignore[return-value]
    return _GroupedLater.apply(rows, anchor(rows.device), (weight,), ends, waiting)  # type: ignore[return-value]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return times_transposed(rows, weight, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, ends = ctx.saved_tensors
        slope = grads[0].contiguous()
        return times(slope, weight, ends), weight_gradient(slope, rows, ends), None


class _GroupedLater(torch.autograd.Function):
    """The same where the weight's gradient waits (deferred.py says why the weight comes in a tuple)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        anchor: Tensor,
        weights: tuple[nn.Parameter],
        ends: Tensor,
        waiting: WeightGradients,
    ) -> Tensor:
        ctx.save_for_backward(rows, ends)
        ctx.weight, ctx.waiting = weights[0], waiting
        return times_transposed(rows, weights[0], ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, ends = (saved.detach() for saved in ctx.saved_tensors)
        slope, weight = grads[0].contiguous(), ctx.weight
        ctx.waiting.add(weight, lambda: weight_gradient(slope, rows, ends))
        return times(slope, weight.detach(), ends), None, None, None, None


def times_transposed(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[n, in] by [G, out, in] -> [n, out]"""
    if _fuses(rows, weight):
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    return _loop(rows, weight.transpose(-2, -1), ends)


def times(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[n, out] by [G, out, in] -> [n, in]"""
    if _fuses(rows, weight):
        return F.grouped_mm(rows, weight, offs=ends)
    return _loop(rows, weight, ends)


def weight_gradient(slope: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """Slopes [n, out] and rows [n, in] -> [G, out, in]; of a group without rows zeros."""
    if _fuses(slope, rows):
        return F.grouped_mm(slope.t(), rows, offs=ends)
    pairs = zip(_parts(slope, ends), _parts(rows, ends), strict=True)
    return torch.stack([own_slope.t() @ own_rows for own_slope, own_rows in pairs])


def _fuses(rows: Tensor, others: Tensor) -> bool:
    """Whether `grouped_mm` takes a product of these."""
    sizes = (rows.shape[-1], *(others.shape[-2:] if others.dim() == 3 else others.shape[-1:]))
    aligned = all(size * rows.itemsize % ALIGNMENT_BYTES == 0 for size in sizes)
    known = rows.device.type == "cpu" or rows.dtype == torch.bfloat16
    return aligned and known and len(rows) > 0


def _loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """[n, a] by [G, a, b] -> [n, b]"""
    pairs = zip(_parts(rows, ends), weight, strict=True)
    return torch.cat([part @ matrix for part, matrix in pairs])


def _parts(rows: Tensor, ends: Tensor) -> list[Tensor]:
    """The rows of each group; waits for `ends`."""
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    return [rows[start:stop] for start, stop in zip(starts, stops, strict=True)]
