"""The grouped product, its twin, and the GPUs with a fused kernel (megalite/parallel/grouped.py)."""

import pytest
import torch
from torch import Tensor, nn

from megalite.parallel import grouped
from megalite.parallel.grouped import RowGroups, grouped_linear

GROUPS = torch.tensor([0, 0, 0, 2, 2, 3])  # none of group 1, nor of 4


def product(width: int, dtype: torch.dtype) -> list[Tensor]:
    """The result and both gradients of a grouped product."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(GROUPS), width, generator=generator).to(dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(5, 2 * width, width, generator=generator).to(dtype))
    made = grouped_linear(rows, weight, RowGroups.of(GROUPS, 5))
    made.float().square().sum().backward()
    assert rows.grad is not None and weight.grad is not None
    return [made.detach(), rows.grad, weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_equals_its_twin(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = product(16, dtype)
    monkeypatch.setattr(grouped, "_fuses", lambda rows, others: False)
    looped = product(16, dtype)
    assert all(torch.equal(one, other) for one, other in zip(fused, looped, strict=True))
    assert not looped[2][1].any() and not looped[2][4].any() and looped[2][0].any()


def test_the_loop_handles_what_the_fused_product_refuses() -> None:
    made, rows_gradient, weight_gradient = product(7, torch.float32)
    assert made.shape == (6, 14) and rows_gradient.shape == (6, 7)
    assert weight_gradient.shape == (5, 14, 7)


@pytest.mark.parametrize("width", [16, 7])
def test_experts_without_a_token_have_gradients_of_zero(width: int) -> None:
    """This may be all experts of a rank."""
    rows = torch.randn(0, width).requires_grad_()
    weight = nn.Parameter(torch.randn(3, 2 * width, width))
    made = grouped_linear(rows, weight, RowGroups.of(torch.empty(0, dtype=torch.int64), 3))
    made.sum().backward()
    assert made.shape == (0, 2 * width) and rows.grad is not None and weight.grad is not None
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_gpus_without_the_fused_kernel_use_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an A100 torch's function would wait for the device in each product."""
    of_device = {0: (8, 0), 1: (9, 0), 2: (10, 0), 3: (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of_device[device.index])
    found = [grouped._one_kernel(torch.device("cuda", index)) for index in of_device]
    grouped._one_kernel.cache_clear()
    assert found == [False, True, True, False]
