"""parallel/joint.py: when several weights are one matrix, with the same products. With ranks:
distributed/test_columns.py."""

import torch

from megalite.parallel.collectives import Split
from megalite.parallel.columns import columns
from megalite.parallel.grid import ALONE
from megalite.parallel.joint import Joint, pays, side_by_side
from megalite.parallel.layers import ColumnLinear

SIZE = 32


def test_tensors_that_are_not_side_by_side_stay_apart() -> None:
    flat = torch.arange(24.0)
    first, second, third = (flat[a:b].view(-1, 2) for a, b in ((2, 8), (8, 12), (12, 14)))
    whole = side_by_side([first, second, third])
    assert whole is not None and torch.equal(whole, flat[2:14].view(-1, 2))
    whole[0, 0] = 7.0
    assert flat[2] == 7.0  # a view
    for apart in (
        [first, third], [second, first], [first, second.clone()], [first, flat[8:12].view(2, 2).t()],
    ):  # fmt: skip
        assert side_by_side(apart) is None
    assert side_by_side([torch.empty(2, 2, device="meta")] * 2) is None


def test_one_product_is_for_outputs_that_are_narrow_beside_the_input() -> None:
    llama_8b = {"q|k|v": (4096 + 2 * 1024, 3), "gate|up": (2 * 14336, 2)}
    joins = {
        (name, tensor): pays(out // tensor, 4096, count)
        for name, (out, count) in llama_8b.items()
        for tensor in (1, 2, 8)
    }
    assert [key for key, joined in joins.items() if joined] == [("q|k|v", 2), ("q|k|v", 8)]
    assert not pays(64, 4096, 1)


def test_one_rank_has_no_sum() -> None:
    linears = [ColumnLinear(SIZE, out, False, ALONE, 0.5) for out in (16, 8, 4)]
    flat = torch.randn(28 * SIZE)
    parts = flat.split([value.weight.numel() for value in linears])
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part.view(linear.weight.shape)
    assert Joint([linear.weight for linear in linears]).is_one
    x = torch.randn(2, 6, SIZE, requires_grad=True)
    outputs = columns(x, linears, Split(ALONE))
    torch.cat(outputs, dim=-1).square().sum().backward()
    weight = torch.cat([linear.weight.detach() for linear in linears]).requires_grad_()
    other = x.detach().clone().requires_grad_()
    (other @ weight.t()).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert weight.grad is not None
    made = torch.cat([linear.weight.grad for linear in linears if linear.weight.grad is not None])
    torch.testing.assert_close(made, weight.grad)
