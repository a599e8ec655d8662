"""ZeRO-1's fp32 sum of 16-bit gradients (megalite/engine/zero.py)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.engine.zero import ShardedOptimizer


class Kernels(TorchDispatchMode):
    """Records the operations that read or write numbers, with the dtypes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            dtypes = [value.dtype for value in args if isinstance(value, torch.Tensor)]
            self.found.append((str(func.overloadpacket), dtypes))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_is_added_by_one_kernel_without_an_fp32_copy(dtype: torch.dtype) -> None:
    first, second = torch.randn(2, 5, 3).to(dtype)
    optimizer: Any = SimpleNamespace(gradient_accumulation_dtype=torch.float32)
    value: Any = SimpleNamespace(grad=first, grad_accum=None)
    ShardedOptimizer._fill_param_grad_accum_attribute(optimizer, value)
    value.grad = second
    with Kernels() as kernels:
        ShardedOptimizer._fill_param_grad_accum_attribute(optimizer, value)
    assert kernels.found == [("aten.add_", [torch.float32, dtype])]
    assert value.grad is None and torch.equal(value.grad_accum, first.float() + second.float())
    ShardedOptimizer._fill_param_grad_accum_attribute(optimizer, value)  # without a gradient
    assert torch.equal(value.grad_accum, first.float() + second.float())
