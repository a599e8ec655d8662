"""Differentiable all-to-all over an axis: each rank sends some of its rows to every other rank.

Next: model/experts.py, which sends tokens to the ranks of their experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.clock import RANK_CLOCK
from megalite.parallel.grid import Axis


@dataclass(frozen=True)
class Route:
    """given: number of rows to send to each rank of the axis, in order; taken: number of rows to receive from each."""

    axis: Axis
    given: tuple[int, ...]
    taken: tuple[int, ...]

    @property
    def back(self) -> "Route":
        """The reverse route."""
        return Route(self.axis, self.taken, self.given)


def exchange(rows: Tensor, route: Route) -> Tensor:
    """rows [sum(given), …], ordered by destination rank -> [sum(taken), …], ordered by source rank. Backward sends the
    gradients along the reverse route."""
    return _Exchange.apply(rows, route)  # type: ignore[return-value]


def exchange_evenly(values: Tensor, axis: Axis) -> Tensor:
    """All-to-all of a contiguous tensor in equal parts; without autograd."""
    result = torch.empty_like(values)
    with RANK_CLOCK.waiting():
        dist.all_to_all_single(result, values, group=axis.group)
    return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return _sent(rows, route)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sent(grads[0], ctx.route.back), None


def _sent(rows: Tensor, route: Route) -> Tensor:
    result = rows.new_empty(sum(route.taken), *rows.shape[1:])
    with RANK_CLOCK.waiting():
        dist.all_to_all_single(
            result, rows.contiguous(), list(route.taken), list(route.given), group=route.axis.group
        )
    return result
