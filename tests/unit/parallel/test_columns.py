"""Column linears that read one input (megalite/parallel/columns.py): when each is called, and gradients computed during
the sum."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megalite.parallel import columns as over
from megalite.parallel.collectives import Split
from megalite.parallel.columns import columns
from megalite.parallel.grid import ALONE, Axis
from megalite.parallel.layers import ColumnLinear

AXIS = Axis(2, 0, (0, 1), None)


def linears(axis: Axis) -> list[ColumnLinear]:
    made = [ColumnLinear(6, 8, True, axis, 1.0), ColumnLinear(6, 4, False, axis, 1.0)]
    generator = torch.Generator().manual_seed(0)
    for linear in made:
        for value in linear.parameters():
            value.data.normal_(generator=generator)
    return made


class Sum:
    """The sum of a rank whose neighbour sends the same."""

    waited = False

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def wait(self) -> None:
        Sum.waited = True
        self.tensor.mul_(2)


def test_gradients_are_autograds_with_the_inputs_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Sum:
        assert async_op and tensor.is_contiguous()
        return Sum(tensor)

    monkeypatch.setattr(over.dist, "all_reduce", all_reduce)
    made, x = linears(AXIS), torch.randn(2, 3, 6, requires_grad=True)
    outputs = columns(x, made, Split(AXIS))
    slopes = [torch.randn_like(output) for output in outputs]
    values = [x, *(value for linear in made for value in linear.parameters())]
    found = torch.autograd.grad(outputs, values, slopes)
    plain = [F.linear(x, linear.weight, linear.bias) for linear in made]
    wanted = torch.autograd.grad(plain, values, slopes)
    assert Sum.waited
    torch.testing.assert_close(found[0], 2 * wanted[0])
    for one, other in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_a_linear_that_is_wrapped_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(ColumnLinear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Wrapped.calls += 1
            return super().forward(x)

    x = torch.randn(1, 2, 6)
    columns(x, [*linears(AXIS), Wrapped(6, 4, False, AXIS, 1.0)], Split(AXIS))
    assert Wrapped.calls == 1


def test_with_zero_3_each_linear_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over._Columns, "apply", lambda *args: pytest.fail("made together"))
    made, x = linears(AXIS), torch.randn(2, 3, 6)
    for output, linear in zip(columns(x, made, Split(AXIS, overlaps=False)), made, strict=True):
        torch.testing.assert_close(output, F.linear(x, linear.weight, linear.bias))


def test_one_rank_has_no_sum_and_no_gradients_keep_nothing() -> None:
    made, x = linears(ALONE), torch.randn(2, 3, 6, requires_grad=True)
    with torch.no_grad():
        outputs = columns(x, made, Split(ALONE))
    for output, linear in zip(outputs, made, strict=True):
        assert not output.requires_grad
        torch.testing.assert_close(output, F.linear(x, linear.weight, linear.bias))
    values = [x, *(value for linear in made for value in linear.parameters())]
    found = torch.autograd.grad([y.sum() for y in columns(x, made, Split(ALONE))], values)
    plain = [F.linear(x, linear.weight, linear.bias).sum() for linear in made]
    for one, other in zip(found, torch.autograd.grad(plain, values), strict=True):
        torch.testing.assert_close(one, other)
