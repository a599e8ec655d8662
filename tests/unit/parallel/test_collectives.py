"""A sum over ranks allocates no memory (megalite/parallel/collectives.py)."""

from unittest import mock

import torch

from megalite.parallel.collectives import leave
from megalite.parallel.grid import Axis
from tests.allocations import peak_bytes


def test_a_sum_over_ranks_makes_no_copy() -> None:
    axis, value = Axis(2, 0, (0, 1), None), torch.randn(1000, 1000, requires_grad=True)
    with mock.patch("torch.distributed.all_reduce", lambda tensor, **_: tensor.mul_(2)):
        held = peak_bytes(lambda: leave(value * 3, axis).backward(torch.ones(1000, 1000)))
        (total,) = torch.autograd.grad(leave(value * 3, axis).sum(), [value])
    assert held < 4 * 1000 * 1000 * 3.1  # the product, the incoming and the outgoing gradient
    assert torch.equal(total, torch.full((1000, 1000), 3.0))
