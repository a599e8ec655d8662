"""The global gradient norm, equal on every rank and for every pipe split, and the verdict on a step's update.

DeepSpeed's own is wrong for fp32 ZeRO-0 with pipe (runtime/utils.py:393 counts stage 0's untied parameters) and
sums in an order that depends on the layout. Here each tensor's squares are summed in fp64, summed over the ranks that
hold pieces of it, and then added in the order of names. One message carries them together with the step's loss and
other values that ranks exchange. It is the only thing in a step that the host waits for. Every rank knows its content
before the update, so either all ranks update or none. Next: zero.py, which calls it.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megalite.parallel.layers import Placement
from megalite.topology.axes import AxisSizes

Judge = Callable[[float, float], bool]
"""(loss, norm) -> whether to update; must be the same on every rank. The norm still includes the loss scale."""

Pieces = Sequence[tuple[Placement, Tensor]]
"""A rank's gradients with their parameters' placements, each any part of the slice."""

BLOCK = 2**16  # elements squared at a time on a CPU: 512 KiB in fp64, which stay in its cache


def squares(values: Tensor) -> Tensor:
    """Sum of the squares on a CPU as an fp64 scalar, without an fp64 copy of the values."""
    # On a CPU vector_norm converts all values first.
    flat, total = values.reshape(-1), torch.zeros((), dtype=torch.float64)
    room = torch.empty(min(BLOCK, flat.numel()), dtype=torch.float64)
    for block in flat.split(BLOCK):
        wide = room[: block.numel()].copy_(block)
        total += torch.dot(wide, wide)
    return total


def squares_of(values: Sequence[Tensor]) -> Tensor:
    """The same for several tensors on one device, [n]: on a GPU in a few kernels for all of them."""
    if values[0].device.type == "cpu":
        return torch.stack([squares(value) for value in values])
    return fused_squares_of(values)


def fused_squares_of(values: Sequence[Tensor]) -> Tensor:
    """As `squares_of`, on any device."""
    norms = torch._foreach_norm(list(values), 2, dtype=torch.float64)  # type: ignore[attr-defined]
    return torch.stack(norms).square()


ONE = AxisSizes()


class GlobalNorm:
    """L2 norm of the gradients of the whole model. Construct it once: a collective agrees on the list of names.

    loss: this rank's part of the step's loss; None: 0. judge: asked at each call. flags: returns this rank's values
    that travel with the message, equally many on every rank. prepare: called with the gradients before their norm
    (tensor_copies.py). After a call `flag_sums` has the flags' sums over all ranks, `overflowed` tells whether only the
    gradient was not finite, and `accepted` whether the update happens.
    """

    def __init__(self, placements: Iterable[Placement], sizes: AxisSizes = ONE) -> None:
        """sizes: of the grid."""
        mine = {placement.name: sizes.along(placement.replicas) for placement in placements}
        everyone: list[dict[str, int]] = [mine]
        if dist.is_initialized():
            everyone = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, mine)
        copies = {name: count for named in everyone for name, count in named.items()}
        self.row = {name: row for row, name in enumerate(sorted(copies))}
        self.most_copies = max(copies.values())
        by_row = [self.most_copies / copies[name] for name in self.row]
        self._times = torch.tensor(by_row, dtype=torch.float64)
        self.loss: Tensor | None = None
        self.judge: Judge | None = None
        self.flags: Callable[[], Sequence[float]] = tuple
        self.flag_sums: list[float] = []
        self.overflowed, self.accepted = False, True
        self.prepare: Callable[[Pieces], None] | None = None
        self._own = self._all = torch.zeros(0)
        self._indices: dict[tuple[int, ...], Tensor] = {}

    @record_function("GlobalNorm")
    def __call__(
        self, pieces: Iterable[tuple[Placement, Tensor]], device: torch.device, replicated: bool
    ) -> Tensor:
        """The norm as an fp64 scalar in main memory, so that reading it never waits for a device. It is NaN or infinite
        if a gradient is, and NaN if the judge refuses the update (collective over the world).

        pieces: this rank's gradients with their parameters' placements, each any part of the slice. replicated:
        whether all ranks that hold copies of a slice pass the same pieces (ZeRO-0) or each its own (ZeRO).
        """
        pieces = list(pieces)
        if self.prepare is not None:
            self.prepare(pieces)
        rows, flags = len(self.row), torch.tensor(self.flags(), dtype=torch.float64)
        sums = torch.zeros(rows + 1 + len(flags), dtype=torch.float64, device=device)
        if len(flags):
            flags = flags if device.type == "cpu" else flags.pin_memory()
            sums[rows + 1 :].copy_(flags, non_blocking=True)
        counted = [
            (self.row[placement.name], gradient)
            for placement, gradient in pieces
            if placement.counted and gradient.numel()
        ]
        if counted:
            numbers, gradients = zip(*counted, strict=True)
            sums.index_add_(0, self._on(device, numbers), squares_of(gradients))
        if self.loss is not None:
            sums[rows] = self.loss
        self._own = sums[:rows].clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
        self._all = sums[:rows]
        total = self._all.sum()
        if replicated:  # an expert's slice has fewer copies than others
            if self._times.device != device:
                self._times = self._times.to(device)
            total = (self._all * self._times).sum() / self.most_copies
        message = torch.cat([total.sqrt().unsqueeze(0), sums[rows:]])
        norm, loss, *self.flag_sums = message.tolist()
        # DeepSpeed continues in fp32, where the norm may be infinite.
        found = ctypes.c_float(norm).value
        self.overflowed = math.isfinite(loss) and not math.isfinite(found)
        accepted = self.judge is None or self.judge(loss, found)
        self.accepted = accepted and math.isfinite(found)
        return torch.tensor(norm if accepted else math.nan, dtype=torch.float64)

    def _on(self, device: torch.device, rows: tuple[int, ...]) -> Tensor:
        """Rows as indices on a device; cached, since they are the same in every step."""
        if rows not in self._indices:
            index = torch.tensor(rows)
            index = index if device.type == "cpu" else index.pin_memory()
            self._indices = {rows: index.to(device, non_blocking=True)}
        return self._indices[rows]

    def not_finite(self, own: bool = False) -> list[str]:
        """Names of the tensors whose gradient was not finite at the last call. own: only in this rank's pieces."""
        bad = (~(self._own if own else self._all).isfinite()).tolist()
        return [name for name, row in self.row.items() if bad[row]]
