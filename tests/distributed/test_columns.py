"""parallel/columns.py: the same numbers as linears of their own, and the input's gradient is on its way before any
weight's is made."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.parallel.collectives import Split
from megalite.parallel.columns import columns
from megalite.parallel.grid import Grid
from megalite.parallel.layers import ColumnLinear, initialise, name_parameters
from tests.ranks import run_ranks

SIZE = 12
OUT = (16, 8, 4)  # units of 4: the last has one, which both ranks hold


class Log(TorchDispatchMode):
    """What happens, in order: products by the shape of their result, and the sum's beginning and end."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm:
            self.events.append(tuple(result.shape))
        return result


def results(rank: int, world_size: int, bias: bool, dtype: torch.dtype) -> list[list[Tensor]]:
    """Outputs and gradients by columns.py, and by linears of their own; checks the order of events."""
    axis = Grid.build(1, world_size).tensor
    linears = [ColumnLinear(SIZE, out, bias, axis, 0.5, unit=4) for out in OUT]
    for number, linear in enumerate(linears):
        name_parameters(linear, f"linear{number}")
        initialise(linear, 1)
        linear.to(dtype)
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(2, 5, SIZE, generator=generator).to(dtype)
    kept = []
    for overlaps in (True, False):
        x = source.clone().requires_grad_()
        outputs = columns(x, linears, Split(axis, overlaps=overlaps))
        log = Log()
        all_reduce = dist.all_reduce

        def begun(tensor: Tensor, log: Log = log, original: Any = all_reduce, **kwargs: Any) -> Any:
            if tensor.shape == source.shape:
                log.events.append("sum")
            return original(tensor, **kwargs)

        with log, mock.patch.object(dist, "all_reduce", begun):
            torch.stack([output.float().square().sum() for output in outputs]).sum().backward()
        weights = [tuple(linear.weight.shape) for linear in linears]
        at = log.events.index("sum")
        made_before = [event for event in log.events[:at] if event in weights]
        assert len(made_before) == (0 if overlaps else len(weights)), log.events
        values = [*outputs, x.grad]
        for linear in linears:
            values += [value.grad for value in linear.parameters()]
            linear.zero_grad()
        kept.append([value.detach().clone() for value in values])
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_columns_are_linears_of_their_own(bias: bool, dtype: torch.dtype) -> None:
    for together, apart in run_ranks(2, results, bias, dtype):
        assert len(together) == 3 + 1 + 3 * (1 + bias)
        for a, b in zip(together, apart, strict=True):
            assert torch.equal(a, b)
