"""The global gradient norm, the same number on every rank and on every pipe split.

DeepSpeed's own is wrong for fp32 ZeRO-0 with pipe (runtime/utils.py:393 counts stage 0's untied parameters) and
sums in an order that hangs on the layout. Here each tensor's squares are summed in fp64, summed over the ranks
that hold pieces of it, and then added in the order of names.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.layers import Placement


class GlobalNorm:
    """L2 norm of the gradients of the whole model. Made once: a collective agrees on the list of names."""

    def __init__(self, placements: Iterable[Placement]) -> None:
        mine = sorted({placement.name for placement in placements})
        everyone: list[list[str]] = [mine]
        if dist.is_initialized():
            everyone = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, mine)
        names = sorted({name for names in everyone for name in names})
        self.row = {name: row for row, name in enumerate(names)}

    def __call__(self, pieces: Iterable[tuple[Placement, Tensor]], device: torch.device, copies: int) -> Tensor:
        """The norm as an fp64 scalar; NaN or infinite where a gradient is (collective over the world).

        pieces: this rank's gradients with their parameters' places, each any part of the slice. copies: how
        many ranks of the data axis pass the same pieces (1 under ZeRO, where each passes its own).
        """
        squares = torch.zeros(len(self.row), dtype=torch.float64, device=device)
        for placement, gradient in pieces:
            if placement.counted:
                squares[self.row[placement.name]] += gradient.double().square().sum()
        if dist.is_initialized():
            dist.all_reduce(squares)
        return (squares.sum() / copies).sqrt()
