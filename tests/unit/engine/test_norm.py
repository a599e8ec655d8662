"""The global norm in one process (megalite/engine/norm.py); with ranks: tests/distributed/test_layouts.py."""

import math

import pytest
import torch
from torch import Tensor

from megalite.engine.norm import BLOCK, GlobalNorm, squares
from megalite.parallel.layers import Placement
from megalite.topology.axes import AxisSizes

CPU = torch.device("cpu")


def place(name: str, counted: bool = True, replicas: str = "replica") -> Placement:
    return Placement((4,), (), 0.1, 0.0, counted, name, replicas)


A, B, COPY = place("a"), place("b"), place("copy", counted=False)
PIECES = [(A, torch.tensor([3.0, 0.0])), (B, torch.tensor([0.0, 4.0])), (COPY, torch.ones(2))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, BLOCK, 2 * BLOCK + 17])
def test_squares_are_summed_in_fp64(dtype: torch.dtype, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = squares(values)
    assert total.dtype == torch.float64
    # fp32 sums would be off by 1e-7; the order of fp64 sums depends on the processor.
    assert total.item() == pytest.approx(values.double().square().sum().item(), rel=1e-12)


def test_counted_gradients_are_summed_and_riders_are_received() -> None:
    norm = GlobalNorm([A, B, COPY])
    norm.loss, norm.flags = torch.tensor(2.5), lambda: (7.0, -1.0)
    asked: list[tuple[float, float]] = []

    def judge(loss: float, found: float) -> bool:
        asked.append((loss, found))
        return True

    norm.judge = judge
    found = norm(PIECES, CPU, replicated=False)
    assert (found.item(), found.dtype) == (5.0, torch.float64)
    assert asked == [(2.5, 5.0)] and norm.flag_sums == [7.0, -1.0]
    assert norm.accepted and not norm.overflowed and norm.not_finite() == []


def test_an_update_that_is_refused_has_no_norm() -> None:
    norm = GlobalNorm([A, B, COPY])
    norm.judge = lambda loss, found: False
    assert math.isnan(norm(PIECES, CPU, replicated=False).item())
    assert not norm.accepted and not norm.overflowed


@pytest.mark.parametrize(
    ("loss", "gradient", "accepted", "overflowed", "named"),
    [
        (1.0, 1.0, True, False, []),
        (1.0, math.inf, False, True, ["b"]),
        (1.0, math.nan, False, True, ["b"]),
        (1.0, 1e40, False, True, []),  # a norm that overflows fp32: DeepSpeed continues with it
        (
            math.nan,
            math.nan,
            False,
            False,
            ["b"],
        ),  # the loss itself is not finite: no lower scale helps
    ],
)
def test_a_gradient_that_is_not_finite_is_named(
    loss: float, gradient: float, accepted: bool, overflowed: bool, named: list[str]
) -> None:
    norm = GlobalNorm([A, B])
    norm.loss = torch.tensor(loss)
    large = torch.tensor([0.0, gradient], dtype=torch.float64)
    norm([(A, torch.ones(2)), (B, large)], CPU, replicated=False)
    assert (norm.accepted, norm.overflowed) == (accepted, overflowed)
    assert norm.not_finite() == norm.not_finite(own=True) == named


def test_copies_count_once_though_an_expert_has_fewer() -> None:
    """2 of 4 data ranks hold an expert's slice: the sum over all ranks contains each slice once per copy."""
    expert = place("expert", replicas="expert_replica")
    norm = GlobalNorm([A, expert], AxisSizes(1, 4, 1, 1, 2))
    dense, routed = torch.tensor([3.0]), torch.tensor([4.0])

    def held(value: Tensor, times: int) -> list[Tensor]:
        return [value] * times

    pieces = [(A, x) for x in held(dense, 4)] + [(expert, x) for x in held(routed, 2)]
    assert norm(pieces, CPU, replicated=True).item() == pytest.approx(5.0)
