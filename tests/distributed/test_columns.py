"""parallel/columns.py and joint.py: the same values as separate linears, one product if weights are contiguous in
memory, and the input's gradient is sent before any weight's gradient is computed."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.parallel.collectives import Split
from megalite.parallel.columns import columns
from megalite.parallel.deferred import WeightGradients, collecting
from megalite.parallel.grid import Grid
from megalite.parallel.joint import Joint
from megalite.parallel.layers import ColumnLinear, initialise, name_parameters
from tests.ranks import run_ranks
from tests.training_runs import document, nothing, train

SIZE, LENGTH = 32, 6
OUT = (16, 8, 4)  # units of 4: the last one is on both ranks


class Log(TorchDispatchMode):
    """What happens, in order: products by the shape of their result, and "sum" where the input's gradient is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm):
            self.events.append(tuple(result.shape))
        return result


def lay_side_by_side(values: list[nn.Parameter]) -> None:
    """Makes weights contiguous, as DeepSpeed does with a parameter group."""
    flat = torch.cat([value.detach().flatten() for value in values])
    for value, part in zip(values, flat.split([v.numel() for v in values]), strict=True):
        value.data = part.view(value.shape)


def linears_of(axis: Any, bias: bool, dtype: torch.dtype, joined: bool) -> list[ColumnLinear]:
    linears = [ColumnLinear(SIZE, out, bias, axis, 0.5, unit=4) for out in OUT]
    for number, linear in enumerate(linears):
        name_parameters(linear, f"linear{number}")
        initialise(linear, 1)
        if linear.bias is not None:
            nn.init.normal_(linear.bias, generator=torch.Generator().manual_seed(number))
        linear.to(dtype)
    if joined:
        lay_side_by_side([linear.weight for linear in linears])
    return linears


WAYS = {
    "apart": dict(joined=False, overlaps=False), "overlapping": dict(joined=False, overlaps=True),
    "joined": dict(joined=True, overlaps=True), "waiting": dict(joined=True, overlaps=True),
}  # fmt: skip


def results(
    rank: int, world_size: int, bias: bool, dtype: torch.dtype, sequence: bool
) -> dict[str, list[Tensor]]:
    """Outputs and gradients of each implementation; checks the order of events."""
    axis = Grid.build(1, world_size).tensor
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(2, LENGTH, SIZE, generator=generator).to(dtype)
    own = Split(axis, sequence).rows(LENGTH)
    found = {}
    for name, way in WAYS.items():
        linears = linears_of(axis, bias, dtype, way["joined"])
        x = whole[:, own.start : own.stop].clone().requires_grad_()
        waiting = WeightGradients() if name == "waiting" else None
        split, log, sent = Split(axis, sequence, way["overlaps"]), Log(), []
        with collecting(waiting):
            outputs = columns(x, linears, split)
            loss = torch.stack([output.float().square().sum() for output in outputs]).sum()

            def begun(original: Any, log: Log = log) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    if SIZE in args[0].shape[1:] and args[0].dim() == 3:
                        log.events.append("sum")
                    return original(*args, **kwargs)

                return call

            with (
                log,
                mock.patch.object(dist, "all_reduce", begun(dist.all_reduce)),
                mock.patch.object(dist, "reduce_scatter_tensor", begun(dist.reduce_scatter_tensor)),
            ):
                loss.backward()
        parameters = [value for linear in linears for value in linear.parameters()]
        if waiting is not None:
            weights, gradients = waiting.take()
            for value, gradient in zip(weights, gradients, strict=True):
                value.grad = gradient
        shapes = [tuple(linear.weight.shape) for linear in linears]
        one = tuple(map(sum, zip(*shapes, strict=True)))[0], SIZE
        at = log.events.index("sum")
        sent = [event for event in log.events[:at] if event in [*shapes, one]]
        after = [event for event in log.events[at:] if event in [*shapes, one]]
        wanted = {
            "apart": (shapes[::-1], []), "overlapping": ([], shapes), "joined": ([], [one]), "waiting": ([], []),
        }  # fmt: skip
        assert (sorted(sent), after) == (sorted(wanted[name][0]), wanted[name][1]), (
            name,
            log.events,
        )
        values = [*outputs, x.grad, *(value.grad for value in parameters)]
        found[name] = [value.detach().clone() for value in values]
    return found


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_columns_are_linears_of_their_own(bias: bool, dtype: torch.dtype, sequence: bool) -> None:
    exact = run_ranks(2, results, bias, torch.float64, sequence)
    for right, found in zip(exact, run_ranks(2, results, bias, dtype, sequence), strict=True):
        assert len(right["apart"]) == 3 + 1 + 3 * (1 + bias)
        for way, values in right.items():
            for value, wanted in zip(values, right["apart"], strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12, msg=way)
        errors = {
            way: [(a.double() - b).norm() for a, b in zip(values, right["apart"], strict=True)]
            for way, values in found.items()
        }
        scales = [value.norm() for value in right["apart"]]
        for way, of_way in errors.items():
            for error, least, scale in zip(of_way, errors["apart"], scales, strict=True):
                assert error <= 1.5 * least + 1e-7 * scale, way


def products(rank: int, world_size: int, keys: dict[str, Any]) -> Counter[tuple[int, int]]:
    """Number of products and of weights in a run."""
    found: Counter[tuple[int, int]] = Counter()
    made = Joint.__init__

    def joint(self: Joint, weights: Any) -> None:
        made(self, weights)
        found[len(weights), len(self.matrices)] += 1

    with mock.patch.object(Joint, "__init__", joint):
        assert train(rank, world_size, [(keys, nothing)]) == [0]
    return found


@pytest.mark.parametrize(
    ("zero", "schedule"), [(0, "1f1b"), (1, "1f1b"), (2, "1f1b"), (1, "zb-h1"), (3, "1f1b")]
)
def test_zero_1_and_2_have_query_key_and_value_side_by_side(
    tmp_path: Path, zero: int, schedule: str
) -> None:
    pipe = 1 + (schedule != "1f1b")
    layout: dict[str, Any] = {"zero": zero, "tensor": 2, "pipe": pipe, "schedule": schedule}
    keys = document(tmp_path, "run", layout, train={"steps": 2})
    if zero:
        keys["bf16"] = {"enabled": True}
    for found in run_ranks(2 * pipe, products, keys):
        of_three = {count for (weights, count) in found if weights == 3}
        assert of_three == {0: {3}, 1: {1}, 2: {1}, 3: set()}[zero], found
