"""The global gradient norm, the same number on every rank and on every pipe split; and the word on a step's update.

DeepSpeed's own is wrong for fp32 ZeRO-0 with pipe (runtime/utils.py:393 counts stage 0's untied parameters) and
sums in an order that depends on the layout. Here each tensor's squares are summed in fp64, summed over the ranks that
hold pieces of it, and then added in the order of names. The step's loss goes with them in one message, so that
every rank knows both before the update, and all leave it out or none. Next: zero.py, which asks.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.layers import Placement

Judge = Callable[[float, float], bool]
"""(loss, norm) -> whether the update may happen; must say the same on every rank. The norm still has the loss scale."""


BLOCK = 2**16  # numbers that are squared at a time on a CPU: 512 KiB in fp64, which stay in its cache


def squares(values: Tensor) -> Tensor:
    """Sum of the squares as an fp64 scalar, without an fp64 copy of the values."""
    if values.device.type != "cpu":
        return torch.linalg.vector_norm(values, dtype=torch.float64).square()
    # On a CPU vector_norm converts all values first.
    flat, total = values.reshape(-1), torch.zeros((), dtype=torch.float64)
    room = torch.empty(min(BLOCK, flat.numel()), dtype=torch.float64)
    for block in flat.split(BLOCK):
        wide = room[: block.numel()].copy_(block)
        total += torch.dot(wide, wide)
    return total


class GlobalNorm:
    """L2 norm of the gradients of the whole model. Made once: a collective agrees on the list of names.

    loss: this rank's part of the step's loss, None: 0; judge: asked at each call. After one, `overflowed` tells
    whether it was the gradient alone that was not finite.
    """

    def __init__(self, placements: Iterable[Placement]) -> None:
        mine = sorted({placement.name for placement in placements})
        everyone: list[list[str]] = [mine]
        if dist.is_initialized():
            everyone = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, mine)
        names = sorted({name for names in everyone for name in names})
        self.row = {name: row for row, name in enumerate(names)}
        self.loss: Tensor | None = None
        self.judge: Judge | None = None
        self.overflowed = False
        self._own = self._all = torch.zeros(0)

    def __call__(self, pieces: Iterable[tuple[Placement, Tensor]], device: torch.device, copies: int) -> Tensor:
        """The norm as an fp64 scalar; NaN or infinite where a gradient is, and where the judge refuses the update
        (collective over the world).

        pieces: this rank's gradients with their parameters' places, each any part of the slice. copies: how
        many ranks of the data axis pass the same pieces (1 under ZeRO, where each passes its own).
        """
        sums = torch.zeros(len(self.row) + 1, dtype=torch.float64, device=device)
        for placement, gradient in pieces:
            if placement.counted:
                sums[self.row[placement.name]] += squares(gradient)
        if self.loss is not None:
            sums[-1] = self.loss
        self._own, self._all = sums.clone(), sums
        if dist.is_initialized():
            dist.all_reduce(sums)
        norm = (sums[:-1].sum() / copies).sqrt()
        loss, found = sums[-1].item(), norm.float().item()  # DeepSpeed goes on with fp32
        self.overflowed = math.isfinite(loss) and not math.isfinite(found)
        accepted = self.judge is None or self.judge(loss, found)
        return norm if accepted else torch.full_like(norm, math.nan)

    def not_finite(self, own: bool = False) -> list[str]:
        """Names of the tensors whose gradient was not finite at the last call; own: by this rank's pieces alone."""
        bad = (~(self._own if own else self._all)[:-1].isfinite()).tolist()
        return [name for name, row in self.row.items() if bad[row]]
