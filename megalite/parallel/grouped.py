"""Grouped matrix products: rows sorted by group, each multiplied by its group's matrix, as experts need.

torch's `grouped_mm` computes all groups in one kernel and leaves the groups' sizes on the device. It needs matrices
whose rows are multiples of 16 bytes, at least one row, and on GPUs bf16. Otherwise an equivalent loop is used, for
which the host must know the sizes. Next: model/experts.py.

n rows, G groups.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.parallel.deferred import WeightGradients, anchor, waiting_now

ALIGNMENT_BYTES = 16
MAJOR_CAPABILITIES = (9, 10)


@dataclass
class RowGroups:
    """ends [G] int32: the index after each group's last row, so that `ends[-1]` is n; a group may be empty. known: the
    same on the host, once it is known there."""

    ends: Tensor
    known: list[int] | None = None

    @classmethod
    def of(cls, sorted_groups: Tensor, count: int) -> "RowGroups":
        """The groups of rows with group numbers `sorted_groups` [n], in ascending order, below `count`."""
        every = torch.arange(count, device=sorted_groups.device)
        return cls(torch.searchsorted(sorted_groups, every, right=True).int())

    def parts(self, rows: Tensor) -> list[Tensor]:
        """The rows of each group. Synchronizes with the device if the host does not know `ends`: once for all products
        of a layer, forward and backward."""
        if self.known is None:
            self.known = self.ends.tolist()
        starts = [0, *self.known[:-1]]
        return [rows[start:stop] for start, stop in zip(starts, self.known, strict=True)]


def grouped_linear(rows: Tensor, weight: nn.Parameter, groups: RowGroups) -> Tensor:
    """Multiplies each row of rows [n, in] by its group's matrix of weight [G, out, in] -> [n, out]."""
    waiting = waiting_now()
    if waiting is None:
        return _Grouped.apply(rows, weight, groups.ends, groups)  # type: ignore[return-value]
    return _GroupedLater.apply(rows, anchor(rows.device), (weight,), groups.ends, groups, waiting)  # type: ignore[return-value]


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, groups: RowGroups) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        ctx.groups = groups
        return times_transposed(rows, weight, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weight, _ = ctx.saved_tensors
        slope, groups = grads[0].contiguous(), ctx.groups
        return times(slope, weight, groups), weight_gradient(slope, rows, groups), None, None


class _GroupedLater(torch.autograd.Function):
    """`_Grouped` with a deferred weight gradient (deferred.py says why the weight is in a tuple)."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        anchor: Tensor,
        weights: tuple[nn.Parameter],
        ends: Tensor,
        groups: RowGroups,
        waiting: WeightGradients,
    ) -> Tensor:
        ctx.save_for_backward(rows, ends)
        ctx.weight, ctx.groups, ctx.waiting = weights[0], groups, waiting
        return times_transposed(rows, weights[0], groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        rows, groups = ctx.saved_tensors[0].detach(), ctx.groups
        slope, weight = grads[0].contiguous(), ctx.weight
        ctx.waiting.add(weight, lambda: weight_gradient(slope, rows, groups))
        return times(slope, weight.detach(), groups), None, None, None, None, None


def times_transposed(rows: Tensor, weight: Tensor, groups: RowGroups) -> Tensor:
    """[n, in] × [G, out, in], transposed -> [n, out]"""
    if _fuses(rows, weight):
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=groups.ends)
    return _loop(rows, weight.transpose(-2, -1), groups)


def times(rows: Tensor, weight: Tensor, groups: RowGroups) -> Tensor:
    """[n, out] × [G, out, in] -> [n, in]"""
    if _fuses(rows, weight):
        return F.grouped_mm(rows, weight, offs=groups.ends)
    return _loop(rows, weight, groups)


def weight_gradient(slope: Tensor, rows: Tensor, groups: RowGroups) -> Tensor:
    """Output gradients [n, out] and rows [n, in] -> [G, out, in]; zeros for a group without rows."""
    if _fuses(slope, rows):
        return F.grouped_mm(slope.t(), rows, offs=groups.ends)
    pairs = zip(groups.parts(slope), groups.parts(rows), strict=True)
    return torch.stack([own_slope.t() @ own_rows for own_slope, own_rows in pairs])


def _fuses(rows: Tensor, others: Tensor) -> bool:
    """Whether `grouped_mm` supports this product."""
    sizes = (rows.shape[-1], *(others.shape[-2:] if others.dim() == 3 else others.shape[-1:]))
    aligned = all(size * rows.itemsize % ALIGNMENT_BYTES == 0 for size in sizes)
    on_cpu = rows.device.type == "cpu"
    supported = on_cpu or (rows.dtype == torch.bfloat16 and _one_kernel(rows.device))
    return aligned and supported and len(rows) > 0


@cache
def _one_kernel(device: torch.device) -> bool:
    """Whether torch has a single kernel for all groups on the device: on Hopper and Blackwell. On other GPUs its
    `grouped_mm` is a loop that reads the sizes in each product (pytorch/pytorch#186620); ours reads them once per
    layer."""
    return torch.cuda.get_device_capability(device)[0] in MAJOR_CAPABILITIES


def _loop(rows: Tensor, weight: Tensor, groups: RowGroups) -> Tensor:
    """[n, a] × [G, a, b] -> [n, b]"""
    pairs = zip(groups.parts(rows), weight, strict=True)
    return torch.cat([part @ matrix for part, matrix in pairs])
